"""The prompts that a cache or an encoder's output was computed with, in the state that they were in.

A name does not identify a prompt: a step of training, `.data`, a fold or another prompt of the same name change it. So its
tensors are compared by value, with a copy that all notes of the same state share.
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
    """An id of a model that is unique across processes; copies of the model share it."""
    return _tokens.setdefault(model, uuid.uuid4().hex)


class Snapshot:
    """The state of a prompt at one moment.

    Args:
        values: copies of its tensors, which never change.
        facts: everything else: its injection and conventions, and the plain attributes and hooks of its modules.
    """

    def __init__(self, values: list[Tensor], facts: tuple[Any, ...]) -> None:
        self.values = values
        self.facts = facts

    def __deepcopy__(self, _memo: object) -> Snapshot:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def equals(self, values: list[Tensor], facts: tuple[Any, ...]) -> bool:
        """Whether a prompt with these tensors and facts is in this state."""
        return facts == self.facts and len(values) == len(self.values) and all(map(_equal, values, self.values))


def _equal(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before if before.device == now.device else before.to(now.device))


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    local: Any = getattr(tensor, "to_local", None)
    own: Tensor = tensor.detach() if local is None else local().detach()
    return own


def snapshot(
    model: nn.Module,
    encoder: nn.Module,
    added: nn.Module | None,
    injection: str,
    conventions: dict[str, Any],
    before: Snapshot | None,
) -> Snapshot:
    """Take a prompt's state; return the snapshot from before if nothing has changed.

    Nothing changes inside a `generate` call. There the address and version of each tensor replace the comparison of values.

    Args:
        added: the prompt's own rows of the vocabulary, if it trains some.
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
    values = [_local(tensor) for tensor in tensors]
    facts = injection, repr(sorted(conventions.items())), _facts(encoder)
    if before is None or not before.equals(values, facts):
        before = Snapshot([value.clone() for value in values], facts)
    if scope is not None and place is not None:
        scope.snapshots[id(encoder)] = place, before
    return before


def _facts(encoder: nn.Module) -> tuple[Any, ...]:
    """The type, the plain attributes and the hooks of each module."""
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
        words: their names, for messages.
        model: the token of their model.
        prompts: the name and the state of each.
        variants: each row's variant, or the one of all rows; None: unknown.
    """

    words: str
    model: str
    prompts: tuple[tuple[str, Snapshot], ...]
    variants: tuple[int | None, ...] | None = None

    def __deepcopy__(self, _memo: object) -> Provenance:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def difference(self, other: Provenance | None) -> str | None:
        """How another provenance differs, in words for a message; None if it does not.

        Args:
            other: None stands for the model without a prompt.
        """
        if other is None or other.words != self.words:
            return "others"
        if other.model != self.model:
            return "of another model"
        for (_, now), (_, before) in zip(self.prompts, other.prompts, strict=True):
            if now is not before and not now.equals(before.values, before.facts):
                return "which have changed since"
        if self.variants and other.variants and not _same_rows(self.variants, other.variants):
            return "in other variants (tasks) of theirs"
        return None


def _same_rows(now: tuple[int | None, ...], before: tuple[int | None, ...]) -> bool:
    """Whether rows have the variants that they had; each row may be repeated, all equally often."""
    if len(set(now)) == len(set(before)) == 1:
        return now[0] == before[0]
    if not len(now) or len(now) % len(before):
        return False
    return all(one == before[row // (len(now) // len(before))] for row, one in enumerate(now))
