"""LLaMA-Adapter: rows that each query attends to beside the text, in the top layers, behind gates that start at zero."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.table_slices import TableSlice, slices_of
from softhooks.encoder import PromptEncoder
from softhooks.errors import CheckpointError, OptionError, UnsupportedMethodError, UnsupportedModeError
from softhooks.inject.branch.branch import CONTEXT, BranchInputs, GatedRows
from softhooks.inject.branch.linear_scaling import linears
from softhooks.inject.branch.projections import require_call
from softhooks.method import Method, choice
from softhooks.methods.llama_adapter_encoder import GATES, AdapterEncoder

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure, Role, Site, Stack

PROMPTS, FACTORS, OFFSETS = "prompts", "factors", "offsets"
CONTEXT_WEIGHT, CONTEXT_BIAS = "context_weight", "context_bias"


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """LLaMA-Adapter: K rows a layer, which the layer's own projections turn into keys and values beside those of the text.

    In the top layers attention returns `softmax(q k^T) v + tanh(g) softmax(q (Wk P)^T) Wv P`, with one g a head. All g start at
    0: the model starts as it is, bit for bit, also where projections have biases, and what the rows say comes in as the gates
    open. The text sees every row, without mask, rotation or a shift of positions; rows skip the layer's input norm. It enters
    every model whose attention goes through transformers' attention interface, or is written out in a way that softhooks knows
    (there step 0 is the base to rounding); an encoder-decoder in the self-attention of both its sides.

    **Context.** Each row of a batch may bring a context, such as the vectors of an image, as `prompt_context` in the call of the
    model (a column of the batch, an argument of `generate`): [B, C], added to all K rows, or [B, K, C], one vector a row. Without
    `context_size`, C is the model's width; with it, a linear layer from C to the width is trained with the prompt. A call without
    it is a text without a context.

    **Version 2.** `scale_and_bias` gives every linear layer of the backbone's blocks a factor and an offset of its own.
    `early_fusion` lets the context into the first layers only, as rows of their own, and leaves the prompts to the others. The
    norms are trained with `attach(..., trainable="*norm*")`; their weights belong to the base and are saved with it. Its disjoint
    groups of parameters are for a loop of one's own, not for a Trainer: one optimizer for batches with images, over
    `text_context_weight`, `text_context_bias` and `text_gates`, and one for batches of text alone, over all but the former two;
    after a backward with images, zero the gradient of the gates behind the first `early_fusion * Hq`, which are the early layers'
    (a text without a context gives those none), keep the gates out of weight decay, and zero every gradient after each step.

    At g = 0 the gradient of the rows is zero: the gates open first. Start from a learning rate of 5e-3 with AdamW (the authors
    ran 1.1e-3, weight decay 0.02, betas 0.9 and 0.95, loss on the response only).

    Source: Zhang et al. 2023, arXiv:2303.16199; Gao et al. 2023, arXiv:2304.15010. Differs: every layer by default, where the
    paper leaves out the lowest two of 32; the paper writes the gate raw, its code and this default take its tanh; a cap that a
    model puts on its scores is put on these too; rows of an early context have gates, so that step 0 is the base; factors are
    kept less 1, so that weight decay pulls them to 1.

    Args:
        num_virtual_tokens: K.
        num_layers: how many layers, from the top, get rows; None: all (that `early_fusion` leaves). Layers are those with
            attention.
        gate: `tanh`, or `raw`: what of g multiplies.
        gate_per: `head`, or `layer`: for what there is a g.
        context_size: C, where it is not the model's width.
        early_fusion: how many layers, from the bottom, get the context as rows; 0 adds it to the prompts.
        scale_and_bias: train a factor and an offset for the output of every linear layer.
        init_std: the rows start from N(0, init_std).

    Shape:
        the encoder's groups, for each stack (`text`, or `encoder` and `decoder`): prompts [layers * K, H] and gates
        [1, layers * Hq] or [1, layers]; where asked for context_weight [H, C] and context_bias [1, H], factors and offsets
        [1, sum of the linear layers' outputs].

    Raises:
        OptionError: an option is wrong.
        UnsupportedMethodError: a layer's attention cannot be entered, or there are fewer layers than asked for.
        UnsupportedModeError: in a forward, if the context has the wrong shape.
    """

    kind: ClassVar[str] = "llama_adapter"
    enters: ClassVar[Literal["embeddings", "attention", "branch"]] = "branch"
    columns: ClassVar[tuple[str, ...]] = (CONTEXT,)
    start_options: ClassVar[tuple[str, ...]] = ("init_std",)
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "gate": ("tanh", "raw"),
        "branch": ("before the output projection",),
        "rows": ("unnormed, unrotated, unmasked",),
    }

    num_virtual_tokens: int = 10
    num_layers: int | None = field(default=None, kw_only=True)
    gate: str = field(default="tanh", kw_only=True)
    gate_per: str = field(default="head", kw_only=True)
    context_size: int | None = field(default=None, kw_only=True)
    early_fusion: int = field(default=0, kw_only=True)
    scale_and_bias: bool = field(default=False, kw_only=True)
    init_std: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        choice("gate", self.gate, ("tanh", "raw"))
        choice("gate_per", self.gate_per, ("head", "layer"))
        for name, least in (("num_layers", 1), ("context_size", 1), ("early_fusion", 0)):
            value = getattr(self, name)
            optional = name != "early_fusion" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise OptionError(f"{name} must be a whole number of {least} or more; it is {value!r}.")
        if not isinstance(self.init_std, (int, float)) or not 0.0 <= self.init_std < float("inf"):
            raise OptionError(f"init_std must be 0 or more; it is {self.init_std!r}.")

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """The gate's form, and where the branch comes in."""
        return {name: self.gate if name == "gate" else allowed[0] for name, allowed in self.conventions_allowed.items()}

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make rows and gates for every stack of the model, initialized."""
        tables = {group: torch.zeros(shape) for group, shape in self.shapes(structure).items()}
        for group, table in tables.items():
            if group.endswith(PROMPTS):
                table.normal_(std=self.init_std)
            elif group.endswith(CONTEXT_WEIGHT):
                table.normal_(std=table.shape[1] ** -0.5)
        return AdapterEncoder(tables, self.gate)

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """The tables of every stack.

        Raises:
            UnsupportedMethodError: rows cannot be given to a layer.
        """
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
        """Check that the tables are those that the options ask for.

        Raises:
            CheckpointError: they are not.
        """
        kinds = {PROMPTS, GATES}
        kinds |= {CONTEXT_WEIGHT, CONTEXT_BIAS} if self.context_size is not None else set()
        kinds |= {FACTORS, OFFSETS} if self.scale_and_bias else set()
        expected = [
            {f"{stack}_{kind}" for stack in stacks for kind in kinds} for stacks in (["text"], ["encoder", "decoder"])
        ]
        if set(tables) not in expected:
            raise CheckpointError(
                f"{source} must hold what {self.kind} trains, {sorted(kinds)}; it holds {sorted(tables)}."
            )
        count = self.num_virtual_tokens
        for group, table in tables.items():
            if group.endswith(PROMPTS) and (not table.shape[0] or table.shape[0] % count):
                raise CheckpointError(
                    f"{source} says {count} virtual tokens; its table {group!r} has {table.shape[0]} rows for all layers."
                )

    # --- the branch ---------------------------------------------------------------------------------------------------

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of saved tables, which nothing is folded in."""
        return AdapterEncoder(tables, self.gate)

    @property
    def scales_linears(self) -> bool:
        """Whether linear layers are scaled."""
        return self.scale_and_bias

    def has_idle(self, given: Container[str]) -> bool:
        """Say whether the linear layer has no context to work on."""
        return self.context_size is not None and CONTEXT not in given

    def parts(self, structure: ModelStructure, group: str) -> list[TableSlice]:
        """List the rows and gates of each layer, and the factors and offsets of each linear layer."""
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
        """The layers that get rows: none of cross-attention."""
        fused, prompted = self._layers(stack)
        return [*fused, *prompted] if role == "self" else []

    def branch_given(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor | None) -> BranchInputs:
        """Each layer's rows and gates; rows have a batch dimension where each row of the batch brings its own context."""
        fused, prompted = self._layers(stack)
        sites = [*fused, *prompted]
        gates = table(f"{stack.name}_{GATES}")[0]
        gates = torch.tanh(gates) if self.gate == "tanh" else gates
        own = gates.split([self._gates(site) for site in sites])
        vectors = None if context is None else self._vectors(table, stack, context)
        prompts = table(f"{stack.name}_{PROMPTS}").unflatten(0, (len(prompted), -1)).unbind(0)
        added = None if self.early_fusion else vectors
        rows = [*(vectors for _ in fused), *(prompt if added is None else prompt + added for prompt in prompts)]
        gated = [
            GatedRows(site, row, gate.expand(require_call(site).query_heads))
            for site, row, gate in zip(sites, rows, own, strict=True)
            if row is not None
        ]
        return BranchInputs(gated, self._scaled(table, stack) if self.scale_and_bias else {})

    def _gates(self, site: Site) -> int:
        """How many gates a layer has."""
        return require_call(site).query_heads if self.gate_per == "head" else 1

    def _layers(self, stack: Stack) -> tuple[list[Site], list[Site]]:
        """The layers that get the context alone, and those that get prompts."""
        sites = stack.sites_of("self")
        count = len(sites) - self.early_fusion if self.num_layers is None else self.num_layers
        if count < 1 or count + self.early_fusion > len(sites):
            raise UnsupportedMethodError(
                "there must be a layer for the prompts, and as many layers as they and an early context are to enter.",
                "Use fewer layers.",
                num_layers=self.num_layers,
                early_fusion=self.early_fusion,
                layers_with_attention=f"{len(sites)} in {stack.path or type(stack.module).__name__}",
            )
        return sites[: self.early_fusion], sites[len(sites) - count :]

    def _vectors(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor) -> Tensor:
        """The context as wide as the model. [B, C] or [B, K, C] -> [B, 1 or K, H]."""
        width = require_call(self.sites(stack, "self")[0]).width
        size = width if self.context_size is None else self.context_size
        vectors = context[:, None] if context.dim() == 2 else context
        count = vectors.shape[1] if self.early_fusion else self.num_virtual_tokens
        if not context.is_floating_point() or vectors.dim() != 3 or vectors.shape[1:] not in ((1, size), (count, size)):
            raise UnsupportedModeError(
                f"`{CONTEXT}` must bring each row of the batch one vector, or one for each virtual token.",
                "Set `context_size` to the width of the vectors if it is not the model's.",
                prompt_context=f"{list(context.shape)}, {context.dtype}",
                expected=f"[B, {size}] or [B, {'any' if self.early_fusion else count}, {size}], floating-point",
            )
        vectors = vectors.float()
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
    """H, of the rows that layers take.

    Raises:
        UnsupportedMethodError: it is not one number, or a layer cannot be given rows.
    """
    widths = sorted({require_call(site).width for site in sites})
    if len(widths) > 1:
        raise UnsupportedMethodError(
            "the layers that get rows must have one width.",
            "Use fewer layers with `num_layers`, or another method.",
            widths=widths,
        )
    return widths[0]
