"""Notes on caches and encoder outputs: the prompts that they were computed with, and where they contain slots.

A slot is a place for a virtual token in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.probing import last_hidden_state
from softhooks.errors import PromptNotReachedError, UnsupportedModeError
from softhooks.inject.caches import caches_in, is_filled
from softhooks.inject.provenance import Provenance
from softhooks.layout.slot_map import Places, Widened, widen

_NOTE = "_softhooks_note"
_BY_REQUEST = "_softhooks_prompts_of_requests"


@dataclass(frozen=True)
class WrittenSlots:
    """The slots that a forward inserted, so that a later forward can find them in the cache or in the encoder's states.

    Attributes:
        places: the number of real tokens before each slot, which does not change if padding is added on either side.
        before: the index in the padded text at which each slot was inserted, [B, S].
        columns: the length of the forward's text, including padding.
        first: the position id of each row's first token minus that of the model's first token, [B, 1]; None for 0. `generate`
            numbers the tokens from 0, RoBERTa from 2.
    """

    places: Places
    before: Tensor
    columns: int
    first: Tensor | None = None

    def places_in(self, batch: int) -> Places | None:
        """Return `places` for a batch that repeats every row the same number of times (beams, samples), or None for any other."""
        rows = self.before.shape[0]
        if not rows or not batch or batch % rows:
            return None
        times = batch // rows
        return Places(self.places.offsets.repeat_interleave(times, 0), self.places.live.repeat_interleave(times, 0))

    def first_in(self, batch: int) -> Tensor | int:
        """Return `first` for a batch for which `places_in` returns places, [batch, 1]."""
        return 0 if self.first is None else self.first.repeat_interleave(batch // self.before.shape[0], 0)

    def widened(self, batch: int) -> Widened | None:
        """Return the indices of text tokens and slots in the sequence with slots, or None if `places_in` returns None."""
        places = self.places_in(batch)
        if places is None:
            return None
        return widen(self.before.repeat_interleave(batch // self.before.shape[0], 0), places.live, self.columns)


@dataclass(frozen=True)
class Note:
    """A note on a cache, an encoder's output, or the states in that output. Copies of the object have the same note.

    Attributes:
        provenance: the prompts that the object was computed with; None if there were none, or if they are unknown.
        slots: the slots in the object.
        injected: for a paged cache, the name of its prompt, or None, and the tensors that the prompt injects into attention.
    """

    provenance: Provenance | None = None
    slots: WrittenSlots | None = None
    injected: tuple[str | None, list[Tensor]] | None = None


_NOTHING = Note()


def note_on(holder: Any) -> Note:
    """Return the note on an object, or an empty note if it has none."""
    note: Note = getattr(holder, _NOTE, _NOTHING)
    return note


def add_note(holder: Any, **changes: Any) -> None:
    """Set fields of the `Note` on an object. Tuples get no note, because they cannot have attributes."""
    if not isinstance(holder, tuple):
        setattr(holder, _NOTE, replace(note_on(holder), **changes))


# --- caches -----------------------------------------------------------------------------------------------------------


def note_caches(output: Any, provenance: Callable[[], Provenance]) -> None:
    """Record the prompts on a cache that the stack created; a cache that the caller passed already has a note."""
    for cache in caches_in(output):
        if note_on(cache).provenance is None:
            add_note(cache, provenance=provenance())


def require_own_cache(cache: Any, now: Provenance | None) -> None:
    """Refuse a cache that was filled with other prompts, or before the prompts changed; record the prompts on an empty cache.

    Args:
        now: the active prompts; None if no prompt is active.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    before = note_on(cache).provenance
    difference = ("others" if before else None) if now is None else now.difference(before)
    if difference is None:
        return
    if is_filled(cache):
        raise UnsupportedModeError(
            "the active prompts differ from the prompts that the cache was filled with; a cache can only be used with the same "
            "prompts.",
            "Activate the prompts that filled the cache, or run the whole text again without the cache.",
            filled=_in_words(before, now, difference),
            now=f"with {now.words}" if now else "without a prompt",
        )
    add_note(cache, provenance=now)


def _in_words(before: Provenance | None, now: Provenance | None, difference: str) -> str:
    if before is None:
        return "without a prompt"
    return f"with {before.words}" + ("" if now is None or before.words != now.words else f", {difference}")


def require_same_prompt(cache: PagedAttentionCache | None, forward_pass: Pass | None, selection: str | None) -> None:
    """Refuse a paged cache that was filled with another prompt, or before the prompt changed; record the prompt on a new one.

    Args:
        cache: the cache of a continuous batch, or None outside of continuous batching.
        forward_pass: the current pass, or None if no prompt is active.
        selection: the name of the active prompt, or None if no prompt is active.
    """
    if cache is None:
        return
    now = [] if forward_pass is None else forward_pass.injected_tensors()
    noted = note_on(cache).injected
    if noted is None:
        add_note(cache, injected=(selection, now))
        return
    words, before = noted
    if _are_equal(now, before):
        return
    changed = ", which has changed since" if words == selection else ""
    raise UnsupportedModeError(
        "the active prompt differs from the prompt that the paged cache was filled with; a cache can only be used with the same "
        "prompt.",
        "Stop the continuous batching manager, and start a new one after `activate`, `disabled` or a training step.",
        filled=f"with {words}" if words else "without a prompt",
        now=f"with {selection}{changed}" if selection else "without a prompt",
    )


def require_unchanged(cache: PagedAttentionCache, prompts: Mapping[Any, list[Tensor]]) -> None:
    """Refuse a prompt that has changed since other forwards filled a paged cache; each request keeps its own prompt.

    Args:
        cache: the cache of a continuous batch whose requests use different prompts.
        prompts: the prompts of the current batch, with the tensors that each injects.
    """
    seen: WeakKeyDictionary[Any, list[Tensor]] = cache.__dict__.setdefault(_BY_REQUEST, WeakKeyDictionary())
    for prompt, now in prompts.items():
        before = seen.setdefault(prompt, now)
        if not _are_equal(now, before):
            raise UnsupportedModeError(
                f"the prompt {prompt.name!r} has changed since the paged cache was filled with it; a cache can only be used with "
                "the same prompt.",
                "Stop the continuous batching manager, and start a new one after a training step.",
            )


# --- encoder outputs --------------------------------------------------------------------------------------------------


def note_encoded(output: Any, provenance: Provenance) -> None:
    """Record, on an encoder's output and on its states, the prompts that the encoder ran with."""
    for part in (output, last_hidden_state(output)):
        add_note(part, provenance=provenance)


def encoded_slots(encoded: Any) -> WrittenSlots | None:
    """Return the slots in an encoder output that the caller passed, from the note on the output or on its states."""
    return next((slots for part in _bearers(encoded) if (slots := note_on(part).slots) is not None), None)


def require_encoded(given: Any, now: Provenance) -> None:
    """Refuse an encoder output that was not computed with the active prompts in their present state."""
    noted = [before for part in _bearers(given) if (before := note_on(part).provenance) is not None]
    differences = [now.difference(before) for before in noted]
    if None not in differences:
        computed = _in_words(noted[0], now, str(differences[0])) if noted else "without a prompt"
        raise PromptNotReachedError(
            "`encoder_outputs` were not computed with the active prompts; encoder and decoder must run with the same prompts.",
            "Leave the encoder to the model, or call the encoder while the prompt is active and pass its output unchanged.",
            encoder_outputs=f"computed {computed}",
            now=f"with {now.words}",
        )


def _bearers(encoded: Any) -> list[Any]:
    """List the objects that may have the note: the output and its states, because beam search copies only the states."""
    return [encoded, *([encoded[0]] if isinstance(encoded, (tuple, list, dict)) and len(encoded) else [])]


def _are_equal(now: list[Tensor], before: list[Tensor]) -> bool:
    return len(now) == len(before) and all(a is b or torch.equal(a, b) for a, b in zip(now, before, strict=True))
