"""An attached prompt, as the hooks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_groups import groups_of
from softhooks.backbone.module_walk import every_tensor
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure, Role, Stack
from softhooks.compat.sharding import refuse_sharded
from softhooks.formats.labels import Labels
from softhooks.inject.branch.branch import Branch, branch_of
from softhooks.inject.prefill import prefill
from softhooks.inject.prefix.key_values import KeyValues, split
from softhooks.inject.provenance import Snapshot, snapshot
from softhooks.inject.reuse import ResultCache
from softhooks.method import Method
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder
from softhooks.runtime.added_tokens import ADDED, AddedTokens
from softhooks.runtime.running import CallBlock, RunningCalls

Injection = Literal["attention", "written_out", "cache", "shared", "slots", "branch"]


class AttachedPrompt:
    """The base class of `softhooks.SoftPrompt`, with the attributes and methods that hooks use.

    Args:
        name: the name of the prompt on the model.
        method: the method with its options.
        module: a submodule of the model, with the encoder, the heads and the embeddings of added tokens.
        conventions: the assumptions about the forward pass (`windowed`, ...) that are saved with the prompt.
        model: the model that was passed to `attach`.
        structure: the model's stacks, embeddings and attention layers.
        running: the calls that are running on the model.
        placeholder_id: the id of an ordinary token, for calls in which only the number of ids matters.

    Attributes:
        layout: where the method inserts its virtual tokens into the text.
        objective: the method's training loss, or None for the model's own loss.
        injection: how the prompt enters the model. A `shared` prompt enters as slots if a call has inputs other than text
            (encoder states, token types, ...).
        requires_sharing: whether such a call raises an error instead, because the prompt was attached with `injection='shared'`.
        takes_left_padding: whether rows may begin with padding; in some models, padding before the text changes the output.
        labels: the label names of the prompt's heads, kept here while the model's config shows other names.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        module: nn.ModuleDict,
        conventions: dict[str, Any],
        *,
        model: nn.Module,
        structure: ModelStructure,
        running: RunningCalls,
        placeholder_id: int,
    ) -> None:
        self.name = name
        self.method = method
        self.module = module
        self.conventions = conventions
        self.model = model
        self.structure = structure
        self.running = running
        self.placeholder_id = placeholder_id
        self.layout = method.token_layout
        self.objective = method.objective()
        self.injection: Injection = "slots"
        self.requires_sharing = False
        self.takes_left_padding = True
        self.labels: Labels | None = None
        self._memory: dict[str, ResultCache[dict[Role, KeyValues]]] = {}
        self._branches: dict[str, ResultCache[Branch]] = {}
        self._replacement: Callable[[Stack], dict[Role, KeyValues]] | None = None

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""
        encoder = self.module["encoder"]
        assert isinstance(encoder, PromptEncoder)
        return encoder

    @property
    def heads(self) -> nn.ModuleDict:
        """The prompt's copies of the model's heads, keyed by module path with slashes instead of dots."""
        heads = self.module["heads"]
        assert isinstance(heads, nn.ModuleDict)
        return heads

    @property
    def added(self) -> AddedTokens | None:
        """The prompt's copies of added tokens' embeddings, or None if it trains no added tokens."""
        added = self.module._modules.get(ADDED)
        return added if isinstance(added, AddedTokens) else None

    @property
    def takes_gradients(self) -> bool:
        """Whether the prompt is trainable."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def head(self, key: str) -> nn.Module | None:
        """Return the prompt's copy of one of the model's heads, or None if it has none."""
        return self.heads[key] if key in self.heads else None  # noqa: SIM401 - a ModuleDict has no get

    def without_objective(self) -> CallBlock:
        """Return a context manager inside which this thread's forwards return the model's own loss."""
        return self.running.block("a forward without the objective", skip_objective=True)

    @property
    def computed(self) -> int:
        """How many times keys and values or gated branches were computed: once per forward, `generate` call or `kept` block."""
        return sum(cache.computed for caches in (self._memory, self._branches) for cache in caches.values())

    @property
    def placeholder_ids(self) -> Tensor:
        """An id for each virtual token, [P], for models that use ids in addition to embeddings."""
        own = self.module._buffers.get(BUFFER)
        if own is not None:
            return own
        count = self.method.num_virtual_tokens
        return torch.full((count,), self.placeholder_id, device=self.encoder.device)

    def embeddings(self, variant: int = 0) -> Tensor:
        """Compute the embeddings of the virtual tokens, [P, H]."""
        return self._encode(EMBEDDINGS, variant)

    def key_values(self, stack: Stack, variants: tuple[int, ...] = (0,)) -> dict[Role, KeyValues]:
        """Compute the prompt's keys and values for one stack, for self-attention (`self`) and cross-attention (`cross`).

        Args:
            variants: the variants of the prompt, such as the tasks of a multitask prompt.
        """
        with self.running.block("the computation of a prompt"):
            found = self._key_values(stack, variants)
        forward = self.running.forward
        if forward is not None:
            forward.prefilled[id(self)] = found
        return found

    def _key_values(self, stack: Stack, variants: tuple[int, ...]) -> dict[Role, KeyValues]:
        if self._replacement is not None:
            return self._replacement(stack)
        memory = self._memory.setdefault(stack.name, ResultCache())
        base = every_tensor(stack.module) if self.method.enters == "embeddings" else ()
        refuse_sharded(base)
        ids = self.module._buffers.get(BUFFER)
        own = [*every_tensor(self.encoder), *(() if ids is None else (ids,))]
        return memory.get(stack, own, base, lambda: self._compute(stack, variants), variants)

    @contextmanager
    def with_key_values(self, key_values: Callable[[Stack], dict[Role, KeyValues]]) -> Iterator[None]:
        """Replace the prompt's keys and values inside the `with` block, for example with those of a teacher's document."""
        outer, self._replacement = self._replacement, key_values
        try:
            yield
        finally:
            self._replacement = outer

    def branch(self, stack: Stack, context: Tensor | None, rows: tuple[int, ...] | None = None) -> Branch:
        """Compute the prompt as a gated branch for one stack.

        Args:
            context: the `prompt_context` of the whole batch.
            rows: the rows of the batch that use the prompt, or None for all.
        """
        memory = self._branches.setdefault(stack.name, ResultCache())
        own = [*every_tensor(self.encoder), *(() if context is None else (context,))]
        base = [tensor for site in self.method.sites(stack, "self") for tensor in every_tensor(site.module)]
        with self.running.block("the computation of a prompt"):
            return memory.get(stack, own, base, lambda: self._branch(stack, context, rows), (context is None, rows))

    def _branch(self, stack: Stack, context: Tensor | None, rows: tuple[int, ...] | None) -> Branch:
        chosen = context if context is None or rows is None else context[list(rows)]
        return branch_of(self.method.branch_inputs(self._encode, stack, chosen))

    def injected(self, stack: Stack) -> list[Tensor]:
        """Return the tensors that the prompt adds to one stack: keys and values, or those of a gated branch."""
        if self.injection == "branch":
            branch = self.branch(stack, None)
            scaled = [part for both in branch.scaled.values() for part in both]
            return [*branch.keys.values(), *branch.values.values(), *scaled]
        forward = self.running.forward
        own = (self.key_values(stack) if forward is None else forward.prefilled[id(self)]).values()
        return [tensor for one in own for tensors in (one.keys, one.values) for tensor in tensors.values()]

    @property
    def states(self) -> Tensor | None:
        """The last hidden states of the virtual tokens of R variants, [R, P, H]; None if not computed separately from text."""
        forward = self.running.forward
        found = None if forward is None else forward.prefilled.get(id(self), {}).get("self")
        return None if found is None else found.states

    def snapshot(self) -> Snapshot:
        """Return a snapshot of the prompt's tensors (as checksums) and settings, to detect later changes."""
        return snapshot(self.model, self.encoder, self.added, self.injection, self.conventions)

    def _compute(self, stack: Stack, variants: tuple[int, ...]) -> dict[Role, KeyValues]:
        if self.method.enters == "embeddings":
            rows = torch.stack([self.embeddings(variant) for variant in variants])
            return {"self": prefill(stack, rows, self.placeholder_ids)}
        result: dict[Role, KeyValues] = {}
        for group, (owner, role) in groups_of(self.structure).items():
            if owner is stack:
                result[role] = split(self._encode(group), self.method.sites(stack, role))
                result[role].windowed = bool(self.conventions.get("windowed", True))
                result[role].shifted = bool(self.conventions.get("shift_positions", True))
        return result

    def _encode(self, group: str, variant: int = 0) -> Tensor:
        device = self.encoder.device
        with torch.autocast(device.type, enabled=False):  # the prompt is computed in fp32
            result: Tensor = self.encoder(group, variant)
        return result

    def __copy__(self) -> AttachedPrompt:
        """Return this object itself, because a copy would not follow later changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, with the model but without cached results."""
        return self.__dict__ | {"_memory": {}, "_branches": {}, "_replacement": None}
