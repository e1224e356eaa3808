"""LLaMA-Adapter: trained vectors that every token attends to in addition to the text, with gates that start at zero."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.stack import ModelStructure, Role, Site, Stack
from softhooks.errors import CheckpointError, OptionError, UnsupportedMethodError, check_choice, check_int
from softhooks.inject.branch.branch import CONTEXT, BranchInputs, GatedRows
from softhooks.inject.branch.linear_scaling import linears
from softhooks.inject.branch.projections import require_call
from softhooks.method import Method, TableSlice, slices_of
from softhooks.methods.llama_adapter_encoder import (
    CONTEXT_BIAS,
    CONTEXT_WEIGHT,
    FACTORS,
    GATES,
    OFFSETS,
    PROMPTS,
    AdapterEncoder,
    check_context,
)
from softhooks.prompt_encoder import PromptEncoder

Gate = Literal["tanh", "raw"]
GatePer = Literal["head", "layer"]


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """LLaMA-Adapter: each layer also attends to K trained vectors, P, and adds the gated result to its attention output.

    Attention returns `softmax(q k^T) v + tanh(g) softmax(q (Wk P)^T) Wv P`, with the layer's own projections Wk and Wv and one
    gate g for each head. All gates are initialized with 0, so the initial output is that of the base model, bit for bit. P has no
    attention mask, no rotary embedding and no input norm, and does not shift the text's position ids.

    The method supports models that use transformers' attention interface, and encoders whose inline attention softhooks rewrites
    (for these, the initial output is that of the base model up to rounding). In an encoder-decoder, both stacks attend to P in
    their self-attention.

    **Context.** Each row of a batch may have a context, such as the vectors of an image. Pass it to the model or to `generate` as
    `prompt_context`. A context [B, C] is added to all K vectors; a context [B, K, C] has one vector for each of them. If C is not
    the model's hidden size, set `context_size`, which adds a trained linear layer from C to the hidden size.

    **Version 2.** `scale_and_bias` trains a factor and an offset for every linear layer in the backbone's blocks. With
    `early_fusion`, the first layers attend to the context, and only the other layers to P. To train the norms too, use
    `attach(..., trainable="*norm*")`; their weights belong to the base model and are saved with it.

    Version 2 trains different parameters on images than on text, which requires your own training loop: one optimizer for batches
    with images, over `text_context_weight`, `text_context_bias` and `text_gates`, and one for text-only batches, over all
    parameters except `text_context_weight` and `text_context_bias`. After a backward pass with images, zero the gradients of all
    gates except the first `early_fusion * Hq` (Hq heads per layer), which belong to the early layers. Exclude the gates from
    weight decay, and zero all gradients after each step.

    While g is 0, P gets no gradient, so the gates change first. Start with AdamW and a learning rate of 5e-3 (the authors use
    1.1e-3, weight decay 0.02, betas 0.9 and 0.95, and the loss on the response only).

    Source: Zhang et al. 2023, arXiv:2303.16199; Gao et al. 2023, arXiv:2304.15010. Differences: by default all layers attend to
    P, but in the paper only the top 30 of 32 do; the default gate is tanh(g), as in the authors' code but not in the paper; a
    model's soft cap on attention scores is applied; layers with early fusion have gates too, so that the initial output is that
    of the base model; factors are stored as their difference from 1, so that weight decay pulls them toward 1.

    Args:
        num_virtual_tokens: K.
        num_layers: the number of layers, counted from the top, that attend to P; None for all except those of `early_fusion`.
        gate: multiply by tanh(g) (`tanh`), or by g itself (`raw`).
        gate_per: one g for each `head`, or for each `layer`.
        context_size: C, if it is not the model's hidden size.
        early_fusion: the number of layers, counted from the bottom, that attend to the context; 0 adds the context to P instead.
        scale_and_bias: train a factor and an offset for the output of every linear layer.
        init_std: P is initialized from N(0, init_std).

    Shape:
        `text_prompts` [layers * K, H] and `text_gates` [1, layers * Hq] (for Hq heads) or [1, layers]; with `context_size` also
        `text_context_weight` [H, C] and `text_context_bias` [1, H]; with `scale_and_bias` also `text_factors` and `text_offsets`,
        both [1, sum of the linear layers' output sizes]. An encoder-decoder has `encoder_...` and `decoder_...` instead of
        `text_...`.

    Raises:
        OptionError: an option is wrong.
        UnsupportedMethodError: softhooks cannot extend a layer's attention, or there are too few layers.
        UnsupportedModeError: a forward pass gets a context of the wrong shape.
    """

    kind: ClassVar[str] = "llama_adapter"
    enters: ClassVar[Literal["embeddings", "attention", "branch"]] = "branch"
    columns: ClassVar[tuple[str, ...]] = (CONTEXT,)
    init_options: ClassVar[tuple[str, ...]] = ("init_std",)
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "gate": get_args(Gate),
        "branch": ("before the output projection",),
        "rows": ("unnormed, unrotated, unmasked",),
    }

    num_virtual_tokens: int = 10
    num_layers: int | None = field(default=None, kw_only=True)
    gate: Gate = field(default="tanh", kw_only=True)
    gate_per: GatePer = field(default="head", kw_only=True)
    context_size: int | None = field(default=None, kw_only=True)
    early_fusion: int = field(default=0, kw_only=True)
    scale_and_bias: bool = field(default=False, kw_only=True)
    init_std: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("gate", self.gate, get_args(Gate))
        check_choice("gate_per", self.gate_per, get_args(GatePer))
        check_int("early_fusion", self.early_fusion, 0)
        if self.num_layers is not None:
            check_int("num_layers", self.num_layers)
        if self.context_size is not None:
            check_int("context_size", self.context_size)
        if not isinstance(self.init_std, (int, float)) or not 0.0 <= self.init_std < float("inf"):
            raise OptionError(f"init_std is {self.init_std!r}; it must be a finite number of at least 0.")

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return how the gate is computed, and how the vectors enter attention."""
        return {name: self.gate if name == "gate" else allowed[0] for name, allowed in self.conventions_allowed.items()}

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with random vectors, and with all gates 0."""
        tables = {group: torch.zeros(shape) for group, shape in self.shapes(structure).items()}
        for group, table in tables.items():
            if group.endswith(PROMPTS):
                table.normal_(std=self.init_std)
            elif group.endswith(CONTEXT_WEIGHT):
                table.normal_(std=table.shape[1] ** -0.5)
        return AdapterEncoder(tables, self.gate)

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """Return the shape of each parameter by name; names start with `text_`, `encoder_` or `decoder_`."""
        from softhooks.inject.branch.projection_probe import find_attention_calls  # imports transformers

        find_attention_calls(structure)
        shapes: dict[str, tuple[int, int]] = {}
        for stack in structure.stacks:
            fused, prompted = self._layers(stack)
            width = _width([*fused, *prompted])
            shapes[f"{stack.name}_{PROMPTS}"] = (len(prompted) * self.num_virtual_tokens, width)
            shapes[f"{stack.name}_{GATES}"] = (1, sum(map(self._gates, (*fused, *prompted))))
            if self.context_size is not None:
                shapes[f"{stack.name}_{CONTEXT_WEIGHT}"] = (width, self.context_size)
                shapes[f"{stack.name}_{CONTEXT_BIAS}"] = (1, width)
            if self.scale_and_bias:
                outputs = sum(size for _, size in linears(stack).values())
                shapes[f"{stack.name}_{FACTORS}"] = shapes[f"{stack.name}_{OFFSETS}"] = (1, outputs)
        return shapes

    def check_tables(self, tables: dict[str, Tensor], source: str) -> None:
        """Check the tensors of a saved prompt against its options."""
        kinds = {PROMPTS, GATES}
        kinds |= {CONTEXT_WEIGHT, CONTEXT_BIAS} if self.context_size is not None else set()
        kinds |= {FACTORS, OFFSETS} if self.scale_and_bias else set()
        expected = [
            {f"{stack}_{kind}" for stack in stacks for kind in kinds} for stacks in (["text"], ["encoder", "decoder"])
        ]
        if set(tables) not in expected:
            raise CheckpointError(
                f"{source} has the tensors {sorted(tables)}; {self.kind} needs {sorted(kinds)} for each encoder or decoder."
            )
        count = self.num_virtual_tokens
        for group, table in tables.items():
            if group.endswith(PROMPTS) and (not table.shape[0] or table.shape[0] % count):
                raise CheckpointError(
                    f"{source} has options for {count} virtual tokens, but the tensor {group!r} has {table.shape[0]} rows, which "
                    f"is not a multiple of {count}."
                )

    # --- the branch ---------------------------------------------------------------------------------------------------

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a folded prompt."""
        return AdapterEncoder(tables, self.gate)

    @property
    def scales_linears(self) -> bool:
        """Whether the prompt also scales the model's linear layers."""
        return self.scale_and_bias

    def has_unused_parameters(self, given: Container[str]) -> bool:
        """Return whether the linear layer of the context gets no gradient, because the call has no context."""
        return self.context_size is not None and CONTEXT not in given

    def table_slices(self, structure: ModelStructure, group: str) -> list[TableSlice]:
        """Return the parts of a parameter that must each get a gradient, one per attention layer or linear layer."""
        stack = next(stack for stack in structure.stacks if group.startswith(f"{stack.name}_"))
        kind = group.removeprefix(f"{stack.name}_")
        if kind in (FACTORS, OFFSETS):
            return slices_of([(f"{kind} of {name}", size, module) for name, (module, size) in linears(stack).items()])
        fused, prompted = self._layers(stack)
        sites = {PROMPTS: prompted, GATES: [*fused, *prompted]}.get(kind, [])
        names = [(f"{kind} of {stack.name} attention {site.index}", site) for site in sites]
        if kind == PROMPTS:
            return slices_of([(name, self.num_virtual_tokens, site.module) for name, site in names], by_rows=True)
        return slices_of([(name, self._gates(site), site.module) for name, site in names])[len(fused) :]

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """Return the self-attention layers that attend to the context or to P; cross-attention layers attend to neither."""
        fused, prompted = self._layers(stack)
        return [*fused, *prompted] if role == "self" else []

    def branch_inputs(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor | None) -> BranchInputs:
        """Compute each layer's vectors and gates; the vectors have a batch dimension if there is a context."""
        fused, prompted = self._layers(stack)
        sites = [*fused, *prompted]
        gates = table(f"{stack.name}_{GATES}")[0]
        gates = torch.tanh(gates) if self.gate == "tanh" else gates
        split_gates = gates.split([self._gates(site) for site in sites])
        vectors = None if context is None else self._project(table, stack, context)
        prompts = table(f"{stack.name}_{PROMPTS}").unflatten(0, (len(prompted), -1)).unbind(0)
        added = None if self.early_fusion else vectors
        rows = [*(vectors for _ in fused), *(prompt if added is None else prompt + added for prompt in prompts)]
        gated = [
            GatedRows(site, row, gate.expand(require_call(site).query_heads))
            for site, row, gate in zip(sites, rows, split_gates, strict=True)
            if row is not None
        ]
        return BranchInputs(gated, self._scaled(table, stack) if self.scale_and_bias else {})

    def _gates(self, site: Site) -> int:
        return require_call(site).query_heads if self.gate_per == "head" else 1

    def _layers(self, stack: Stack) -> tuple[list[Site], list[Site]]:
        """Return the layers that attend to the context, and those that attend to P."""
        sites = stack.sites_of("self")
        count = len(sites) - self.early_fusion if self.num_layers is None else self.num_layers
        if count < 1 or count + self.early_fusion > len(sites):
            raise UnsupportedMethodError(
                f"{len(sites)} layers with attention are too few for num_layers={self.num_layers} and "
                f"early_fusion={self.early_fusion}; at least one layer must be left for the prompt.",
                "Reduce `num_layers` or `early_fusion`.",
                num_layers=self.num_layers,
                early_fusion=self.early_fusion,
                layers_with_attention=f"{len(sites)} in {stack.path or type(stack.module).__name__}",
            )
        return sites[: self.early_fusion], sites[len(sites) - count :]

    def _project(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor) -> Tensor:
        """Project the context to the model's width. [B, C] or [B, K, C] -> [B, 1 or K, H]."""
        width = require_call(self.sites(stack, "self")[0]).width
        count = None if self.early_fusion else self.num_virtual_tokens
        vectors = check_context(context, width if self.context_size is None else self.context_size, count)
        if self.context_size is None:
            return vectors
        weight, bias = table(f"{stack.name}_{CONTEXT_WEIGHT}"), table(f"{stack.name}_{CONTEXT_BIAS}")[0]
        with torch.autocast(weight.device.type, enabled=False):
            return functional.linear(vectors.to(weight), weight, bias)

    def _scaled(self, table: Callable[[str], Tensor], stack: Stack) -> dict[str, tuple[Tensor, Tensor]]:
        names, sizes = zip(*((name, size) for name, (_, size) in linears(stack).items()), strict=True)
        factors = (1.0 + table(f"{stack.name}_{FACTORS}")).split(sizes, dim=1)
        offsets = table(f"{stack.name}_{OFFSETS}").split(sizes, dim=1)
        return dict(zip(names, zip(factors, offsets, strict=True), strict=True))


def _width(sites: Sequence[Site]) -> int:
    """Return H, the common input size of these layers."""
    widths = sorted({require_call(site).width for site in sites})
    if len(widths) > 1:
        raise UnsupportedMethodError(
            f"the attention layers have different input sizes: {widths}; they must be equal.",
            "Use fewer layers with `num_layers`, or another method.",
            input_sizes=widths,
        )
    return widths[0]
