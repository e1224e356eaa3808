"""Notes on caches and encoder outputs: the prompts that they were computed with, and the places of slots in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.probing import last_hidden_state
from softhooks.errors import PromptNotReachedError, UnsupportedModeError
from softhooks.inject.caches import caches_in, is_filled
from softhooks.inject.provenance import Provenance
from softhooks.layout.slot_map import Places, Widened, widen

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import PagedAttentionCache

_NOTE = "_softhooks_note"


@dataclass(frozen=True)
class WrittenSlots:
    """The places where a forward inserted slots.

    A later forward finds the slots by their offsets from a row's first token, so columns may be added on either side.

    Attributes:
        places: the places of the slots in each row.
        before: the text column after each slot, in the forward that inserted the slots, [B, S].
        columns: the number of text columns of that forward.
    """

    places: Places
    before: Tensor
    columns: int

    def places_in(self, batch: int) -> Places | None:
        """Return the places for a batch that repeats each row equally often (beams, samples), or None for other batch sizes."""
        times = self._times(batch)
        if times is None:
            return None
        return Places(self.places.offsets.repeat_interleave(times, 0), self.places.live.repeat_interleave(times, 0))

    def widened(self, batch: int) -> Widened | None:
        """Return the map between text columns and columns with slots for a batch, or None if `places_in` returns None."""
        places, times = self.places_in(batch), self._times(batch)
        if places is None or times is None:
            return None
        return widen(self.before.repeat_interleave(times, 0), places.live, self.columns)

    def _times(self, batch: int) -> int | None:
        rows = self.before.shape[0]
        return batch // rows if rows and batch and batch % rows == 0 else None


@dataclass(frozen=True)
class Note:
    """The note on a cache, on an encoder's output or on its states; copies of the object keep it.

    Attributes:
        provenance: the prompts that the object was computed with; None if there was no prompt, or if this is unknown.
        slots: the places of the slots in the object.
        injected: for a paged cache, the names of the prompts in words, and their keys and values at attention.
    """

    provenance: Provenance | None = None
    slots: WrittenSlots | None = None
    injected: tuple[str | None, list[Tensor]] | None = None


_NOTHING = Note()


def note_on(holder: Any) -> Note:
    """Return the note on a cache, on states, or on the output that contains the states, or an empty note if it has none."""
    note: Note = getattr(holder, _NOTE, _NOTHING)
    return note


def _add(holder: Any, **changes: Any) -> None:
    if not isinstance(holder, tuple):  # a tuple cannot have attributes
        setattr(holder, _NOTE, replace(note_on(holder), **changes))


def slots_in(holder: Any) -> WrittenSlots | None:
    """Return the slot places that `note_slots` recorded on a cache or an encoder output, or None if it recorded none."""
    return note_on(holder).slots


def note_slots(holder: Any, slots: WrittenSlots) -> None:
    """Record where the slots are, as a note on a cache, on encoder states, or on the output that contains the states."""
    _add(holder, slots=slots)


# --- caches -----------------------------------------------------------------------------------------------------------


def note_caches(output: Any, provenance: Callable[[], Provenance]) -> None:
    """Note the prompts on a cache that the stack created; a cache that was passed in already has its note."""
    for cache in caches_in(output):
        if note_on(cache).provenance is None:
            _add(cache, provenance=provenance())


def require_own_cache(cache: Any, now: Provenance | None) -> None:
    """Check that a cache was filled with the active prompts in their present state, or note the prompts on an empty cache.

    Args:
        now: the active prompts; None if no prompt is active.

    Raises:
        UnsupportedModeError: the cache was filled without a prompt, with other prompts, or before the prompts changed.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    before = note_on(cache).provenance
    difference = ("others" if before else None) if now is None else now.difference(before)
    if difference is None:
        return
    if is_filled(cache):
        raise UnsupportedModeError(
            "the cache was not filled with the prompts that are active now; a cache can only be used with the prompts that "
            "filled it.",
            "Activate the prompts that filled the cache, or start again from the text without the cache.",
            filled=_in_words(before, now, difference),
            now=f"with {now.words}" if now else "without a prompt",
        )
    _add(cache, provenance=now)


def _in_words(before: Provenance | None, now: Provenance | None, difference: str) -> str:
    if before is None:
        return "without a prompt"
    return f"with {before.words}" + ("" if now is None or before.words != now.words else f", {difference}")


def require_same_prompt(cache: PagedAttentionCache | None, forward_pass: Pass | None, selection: str | None) -> None:
    """Check that a paged cache was filled with the active prompt, or note the prompt on a new cache.

    Args:
        cache: the cache of a continuous batch, or None outside of continuous batching.
        forward_pass: the pass that was opened and is closed on an error; None if no prompt is active.
        selection: the name of the active prompt, in words.

    Raises:
        UnsupportedModeError: the prompt was a different one, or has been trained since.
    """
    if cache is None:
        return
    now = [] if forward_pass is None else forward_pass.injected_tensors()
    noted = note_on(cache).injected
    if noted is None:
        _add(cache, injected=(selection, now))
        return
    words, before = noted
    if len(now) == len(before) and all(a is b or torch.equal(a, b) for a, b in zip(now, before, strict=True)):
        return
    if forward_pass is not None:
        forward_pass.close()
    changed = ", which has changed since" if words == selection else ""
    raise UnsupportedModeError(
        "the paged cache was not filled with the prompt that is active now; a cache can only be used with the prompt that "
        "filled it.",
        "Stop the manager, and start a new one after `activate`, `disabled` or a training step.",
        filled=f"with {words}" if words else "without a prompt",
        now=f"with {selection}{changed}" if selection else "without a prompt",
    )


# --- encoder outputs --------------------------------------------------------------------------------------------------


def note_encoded(output: Any, provenance: Provenance) -> None:
    """Record, on an encoder's output and on its states, the prompts that the encoder ran with."""
    for part in (output, last_hidden_state(output)):
        _add(part, provenance=provenance)


def encoded_slots(encoded: Any) -> WrittenSlots | None:
    """Find where the slots are in an encoder output that the caller passed, from the note on the output or on its states."""
    return next((slots for slots in map(slots_in, _bearers(encoded)) if slots is not None), None)


def require_encoded(given: Any, now: Provenance) -> None:
    """Check that an encoder output that the caller passed was computed with the active prompts.

    Raises:
        PromptNotReachedError: it was computed without a prompt, with other prompts, or before the prompts changed.
    """
    noted = [before for part in _bearers(given) if (before := note_on(part).provenance) is not None]
    differences = [now.difference(before) for before in noted]
    if None not in differences:
        raise PromptNotReachedError(
            "`encoder_outputs` were not computed with the active prompts; the decoder needs the states of an encoder that ran "
            "with the prompt.",
            "Let the model run its encoder itself, or call the encoder while the prompt is active and pass its output unchanged.",
            encoder_outputs=f"made {_in_words(noted[0], now, str(differences[0]))}"
            if noted
            else "made without a prompt",
            now=now.words,
        )


def _bearers(encoded: Any) -> list[Any]:
    """List the objects that may hold the note: the output and its states, because beam search copies only the states."""
    return [encoded, *([encoded[0]] if isinstance(encoded, (tuple, list, dict)) and len(encoded) else [])]
