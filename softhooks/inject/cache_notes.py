"""Notes on caches and encoder outputs: the prompts that they were computed with, and where slots are in them."""

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
    """Where a forward wrote slots.

    A later forward finds them by their offsets, which count from a row's first token, so columns may be added on either side.

    Attributes:
        places: of the slots in each row.
        before: the text column that each stood before in the forward that wrote them, [B, S].
        columns: the text columns of that forward.
    """

    places: Places
    before: Tensor
    columns: int

    def places_in(self, batch: int) -> Places | None:
        """The places in a batch that repeats each of these rows equally often (beams, samples); None for any other batch."""
        times = self._times(batch)
        if times is None:
            return None
        return Places(self.places.offsets.repeat_interleave(times, 0), self.places.live.repeat_interleave(times, 0))

    def widened(self, batch: int) -> Widened | None:
        """The map of an encoder's forward, for such a batch."""
        places, times = self.places_in(batch), self._times(batch)
        if places is None or times is None:
            return None
        return widen(self.before.repeat_interleave(times, 0), places.live, self.columns)

    def _times(self, batch: int) -> int | None:
        rows = self.before.shape[0]
        return batch // rows if rows and batch and batch % rows == 0 else None


@dataclass(frozen=True)
class Note:
    """What is noted on a cache, on an encoder's output, or on its states. Copies of the holder keep the note.

    Attributes:
        provenance: the prompts that it was computed with; None: the model without a prompt, or unknown.
        slots: where slots are in it.
        injected: of a paged cache, the prompts in words, and the keys and values that they had at attention.
    """

    provenance: Provenance | None = None
    slots: WrittenSlots | None = None
    injected: tuple[str | None, list[Tensor]] | None = None


_NOTHING = Note()


def note_on(holder: Any) -> Note:
    """The note on a cache, on states, or on the output that holds them; an empty one where there is none."""
    note: Note = getattr(holder, _NOTE, _NOTHING)
    return note


def _add(holder: Any, **changes: Any) -> None:
    if not isinstance(holder, tuple):  # which has no attributes
        setattr(holder, _NOTE, replace(note_on(holder), **changes))


def slots_in(holder: Any) -> WrittenSlots | None:
    """Where slots are in a cache, in states, or in the output that holds them; None where nothing is noted."""
    return note_on(holder).slots


def note_slots(holder: Any, slots: WrittenSlots) -> None:
    """Note where slots are in a cache, in states, or in the output that holds them."""
    _add(holder, slots=slots)


# --- caches -----------------------------------------------------------------------------------------------------------


def note_caches(output: Any, provenance: Callable[[], Provenance]) -> None:
    """Note on a cache that the stack has made which prompts filled it; a cache that was given has its note already."""
    for cache in caches_in(output):
        if note_on(cache).provenance is None:
            _add(cache, provenance=provenance())


def require_own_cache(cache: Any, now: Provenance | None) -> None:
    """Check that what a cache holds was computed with the prompts that are on, as they are; note them on an empty one.

    Args:
        now: the prompts that are on; None: the model without a prompt.

    Raises:
        UnsupportedModeError: it was filled without a prompt, with others, or before they changed.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    before = note_on(cache).provenance
    difference = ("others" if before else None) if now is None else now.difference(before)
    if difference is None:
        return
    if is_filled(cache):
        raise UnsupportedModeError(
            "the cache was filled with other prompts than are on now; a cache serves only the prompts that it was filled with.",
            "Continue with these prompts on, or start again from the text without the cache.",
            filled=_in_words(before, now, difference),
            now=f"with {now.words}" if now else "without a prompt",
        )
    _add(cache, provenance=now)


def _in_words(before: Provenance | None, now: Provenance | None, difference: str) -> str:
    if before is None:
        return "without a prompt"
    return f"with {before.words}" + ("" if now is None or before.words != now.words else f", {difference}")


def require_same_prompt(cache: PagedAttentionCache | None, forward_pass: Pass | None, selection: str | None) -> None:
    """Check that a paged cache was filled with the prompt that is on now; note it on a new one.

    Args:
        cache: of a continuous batch; None outside of one.
        forward_pass: the pass that was opened, and is closed on an error; None where no prompt is on.
        selection: the prompt that is on, in words.

    Raises:
        UnsupportedModeError: it was another one, or has been trained since.
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
        "the paged cache was filled with another prompt than is on now; a cache serves only the prompt that it was filled with.",
        "Stop the manager and start another after `activate`, `disabled` or a step of training.",
        filled=f"with {words}" if words else "without a prompt",
        now=f"with {selection}{changed}" if selection else "without",
    )


# --- encoder outputs --------------------------------------------------------------------------------------------------


def note_encoded(output: Any, provenance: Provenance) -> None:
    """Note on an encoder's output, and on its states, which prompts it ran with."""
    for part in (output, last_hidden_state(output)):
        _add(part, provenance=provenance)


def encoded_slots(encoded: Any) -> WrittenSlots | None:
    """Where slots are in an encoder's output that a caller brings; the output or its states bear the note."""
    return next((slots for slots in map(slots_in, _bearers(encoded)) if slots is not None), None)


def require_encoded(given: Any, now: Provenance) -> None:
    """Check that an encoder's output, which a caller brings, was computed with the prompts that are on.

    Raises:
        PromptNotReachedError: it was computed without a prompt, with others, or before they changed.
    """
    noted = [before for part in _bearers(given) if (before := note_on(part).provenance) is not None]
    differences = [now.difference(before) for before in noted]
    if None not in differences:
        raise PromptNotReachedError(
            "`encoder_outputs` were not computed with the prompts that are on; a decoder must be given the states of an encoder "
            "that ran with the prompt.",
            "Let the model run its encoder itself, or call the encoder while the prompt is on and pass its output as it is.",
            encoder_outputs=f"made {_in_words(noted[0], now, str(differences[0]))}" if noted else "made without",
            now=now.words,
        )


def _bearers(encoded: Any) -> list[Any]:
    """What may bear the note of an encoder's output: beam search copies the states and keeps the output that holds them."""
    return [encoded, *([encoded[0]] if isinstance(encoded, (tuple, list, dict)) and len(encoded) else [])]
