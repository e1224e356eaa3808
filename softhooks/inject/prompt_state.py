"""The state of the prompts that something was made with: what a note on a cache or on an encoder's output holds.

A prompt's name does not tell what it was: a step of training, `.data`, a fold or another prompt under the same name change it. So
its tensors are compared by value, with a copy that all notes of the same state share.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_tensor
from softhooks.inject.reuse import scope_of

if TYPE_CHECKING:
    from softhooks.prompt import SoftPrompt
    from softhooks.runtime.selection import Selection

_PLAIN = (bool, int, float, str, type(None))
_tokens: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def token_of(model: nn.Module) -> str:
    """A name that tells a model from all others, here and in other processes; its copies share it."""
    return _tokens.setdefault(model, uuid.uuid4().hex)


class Snapshot:
    """A prompt at one moment: its tensors, and the plain attributes and hooks of the modules that make it.

    Args:
        values: its tensors, which must not change any more.
        facts: all else.
    """

    def __init__(self, values: list[Tensor], facts: tuple[Any, ...]) -> None:
        self.values = values
        self.facts = facts

    def __deepcopy__(self, _memo: object) -> Snapshot:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def equals(self, values: list[Tensor], facts: tuple[Any, ...]) -> bool:
        """Whether it is the snapshot of these."""
        return facts == self.facts and len(values) == len(self.values) and all(map(_equal, values, self.values))


def _equal(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before if before.device == now.device else before.to(now.device))


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    local: Any = getattr(tensor, "to_local", None)
    own: Tensor = tensor.detach() if local is None else local().detach()
    return own


def snapshot(prompt: SoftPrompt, before: Snapshot | None) -> Snapshot:
    """Take a prompt's state; the same object as before if nothing has changed.

    In a `generate` call, where nothing changes by its promise, tensors are known by where they lie and by their version.
    """
    tensors = [*every_tensor(prompt.encoder), *(prompt.added.parameters() if prompt.added else ())]
    scope = scope_of(prompt.prompted_model)
    place = None
    if scope is not None and not scope.is_explicit and not any(tensor.is_inference() for tensor in tensors):
        place = [(id(prompt.encoder), prompt.injection), *[(t.data_ptr(), t._version) for t in tensors]]
        known = scope.snapshots.get(id(prompt))
        if known is not None and known[0] == place:
            found: Snapshot = known[1]
            return found
    values, facts = [_local(tensor) for tensor in tensors], _facts(prompt)
    if before is None or not before.equals(values, facts):
        before = Snapshot([value.clone() for value in values], facts)
    if scope is not None and place is not None:
        scope.snapshots[id(prompt)] = place, before
    return before


def _facts(prompt: SoftPrompt) -> tuple[Any, ...]:
    modules = tuple(
        (
            type(module).__qualname__,
            tuple((key, value) for key, value in vars(module).items() if key != "training" and type(value) in _PLAIN),
            tuple(map(id, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))),
        )
        for module in prompt.encoder.modules()
    )
    return prompt.injection, tuple(sorted((key, repr(value)) for key, value in prompt.conventions.items())), modules


@dataclass(frozen=True)
class Made:
    """The prompts that something was made with.

    Attributes:
        words: which, in words.
        model: the token of their model.
        prompts: each by name, as it was.
        variants: each row's variant, or the one of all rows; None: there is no telling.
    """

    words: str
    model: str
    prompts: tuple[tuple[str, Snapshot], ...]
    variants: tuple[int | None, ...] | None = None

    def __deepcopy__(self, _memo: object) -> Made:
        """It never changes."""
        return self

    def difference(self, other: Made | None) -> str | None:
        """Say how others differ that something was made with, None: the bare model; None if they do not."""
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
    """Whether rows have the variants that they had, each row perhaps repeated as often as the others."""
    if len(set(now)) == len(set(before)) == 1:
        return now[0] == before[0]
    if not len(now) or len(now) % len(before):
        return False
    return all(one == before[row // (len(now) // len(before))] for row, one in enumerate(now))


def made_with(prompts: list[SoftPrompt], words: str, token: str, selection: Selection | None = None) -> Made:
    """Note the state of the prompts that are on."""
    variants: tuple[int | None, ...] | None = None
    if selection is not None:
        uses = selection.uses
        rows = selection.rows
        variants = (
            (uses[0].variant,) if rows is None else tuple(None if row is None else uses[row].variant for row in rows)
        )
    return Made(words, token, tuple((prompt.name, prompt.snapshot()) for prompt in prompts), variants)
