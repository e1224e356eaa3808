"""Record the prompts that a cache or an encoder's output was computed with, and the state of each prompt.

A name does not identify the state of a prompt: a training step, an assignment to `.data`, folding, or another prompt with the
same name changes it. So the prompt's tensors are compared by value with a copy, which is shared by all records of that state.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_tensor
from softhooks.inject.reuse import scope_of

_PLAIN = (bool, int, float, str, type(None))
_tokens: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def token_of(model: nn.Module) -> str:
    """Return an id for a model object, unique across processes."""
    return _tokens.setdefault(model, uuid.uuid4().hex)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a prompt at one moment.

    Attributes:
        values: copies of the prompt's tensors.
        facts: the injection, the conventions, and the plain attributes and hooks of the prompt's modules.
    """

    values: list[Tensor]
    facts: tuple[Any, ...]

    def __deepcopy__(self, _memo: object) -> Snapshot:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def equals(self, values: list[Tensor], facts: tuple[Any, ...]) -> bool:
        """Whether these tensors and facts are the same as in the snapshot."""
        if facts != self.facts or len(values) != len(self.values):
            return False
        return all(torch.equal(now, old.to(now.device)) for now, old in zip(values, self.values, strict=True))


def snapshot(
    model: nn.Module,
    encoder: nn.Module,
    added: nn.Module | None,
    injection: str,
    conventions: dict[str, Any],
    before: Snapshot | None,
) -> Snapshot:
    """Take a snapshot of a prompt; return the previous one if nothing has changed.

    Inside a `generate` call, only the address and version of each tensor are compared, because nothing trains there.

    Args:
        added: the rows of added tokens that the prompt trains, if any.
        before: the previous snapshot.
    """
    tensors = [*every_tensor(encoder), *(added.parameters() if added else ())]
    scope = scope_of(model)
    place = None
    if scope is not None and not scope.is_explicit and not any(tensor.is_inference() for tensor in tensors):
        place = [injection, *[(t.data_ptr(), t._version) for t in tensors]]
        known = scope.snapshots.get(id(encoder))
        if known is not None and known[0] == place:
            found: Snapshot = known[1]
            return found
    # Of a sharded tensor (DTensor), only the shard of this process is compared.
    values = [(t.to_local() if hasattr(t, "to_local") else t).detach() for t in tensors]
    facts = injection, repr(sorted(conventions.items())), _facts(encoder)
    if before is None or not before.equals(values, facts):
        before = Snapshot([value.clone() for value in values], facts)
    if scope is not None and place is not None:
        scope.snapshots[id(encoder)] = place, before
    return before


def _facts(encoder: nn.Module) -> tuple[Any, ...]:
    """Return the type, the plain attributes and the hooks of each module."""
    return tuple(
        (
            type(module).__qualname__,
            tuple((key, value) for key, value in vars(module).items() if key != "training" and type(value) in _PLAIN),
            tuple(map(id, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))),
        )
        for module in encoder.modules()
    )


@dataclass(frozen=True)
class Provenance:
    """The prompts that a cache or an encoder's output was computed with.

    Attributes:
        words: the names of the prompts, for messages.
        model: the model's `token_of`.
        prompts: the name and the state of each prompt.
        variants: the prompt variant of each row, or a single variant for all rows; None if unknown.
    """

    words: str
    model: str
    prompts: tuple[tuple[str, Snapshot], ...]
    variants: tuple[int | None, ...] | None = None

    def __deepcopy__(self, _memo: object) -> Provenance:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def difference(self, other: Provenance | None) -> str | None:
        """Describe, for a message, how another provenance differs from this one; return None if it does not.

        Args:
            other: the other provenance, or None for the model without a prompt.
        """
        if other is None or other.words != self.words:
            return "others"
        if other.model != self.model:
            return "of another model"
        for (_, now), (_, before) in zip(self.prompts, other.prompts, strict=True):
            if now is not before and not now.equals(before.values, before.facts):
                return "which have changed since"
        if self.variants and other.variants and not _same_rows(self.variants, other.variants):
            return "with other variants (tasks)"
        return None


def _same_rows(now: tuple[int | None, ...], before: tuple[int | None, ...]) -> bool:
    """Whether the variants of the rows are the same as before, or each row is now repeated equally often."""
    if len(set(now)) == len(set(before)) == 1:
        return now[0] == before[0]
    if not len(now) or len(now) % len(before):
        return False
    return all(one == before[row // (len(now) // len(before))] for row, one in enumerate(now))
