"""Notes of where slots stand, on what holds them: caches, and the states of an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softhooks.layout.slot_map import Places, Widened, widen

_NOTE = "_softhooks_slots"


@dataclass(frozen=True)
class Written:
    """Where slots were written.

    A later forward finds them by their offsets: those count from a row's first token, whatever is added at either side.

    Attributes:
        places: of the slots in each row.
        before: the text column that each stood before in the forward that wrote them, [B, S].
        columns: the text columns of that forward.
    """

    places: Places
    before: Tensor
    columns: int

    def places_in(self, batch: int) -> Places | None:
        """The places in a batch whose rows are these, each as often as the others (beams, samples); None: it has others."""
        times = self._times(batch)
        places = self.places
        return (
            None
            if times is None
            else Places(places.offsets.repeat_interleave(times, 0), places.live.repeat_interleave(times, 0))
        )

    def widened(self, batch: int) -> Widened | None:
        """The map of an encoder's forward, for such a batch."""
        times = self._times(batch)
        return (
            None
            if times is None
            else widen(
                self.before.repeat_interleave(times, 0), self.places.live.repeat_interleave(times, 0), self.columns
            )
        )

    def _times(self, batch: int) -> int | None:
        rows = self.before.shape[0]
        return batch // rows if rows and batch and batch % rows == 0 else None


def note_written(holder: Any, written: Written) -> None:
    """Note on a cache, on states, or on the output that holds them, where slots stand; a copy has the note too."""
    if not isinstance(holder, tuple):
        setattr(holder, _NOTE, written)


def written_in(holder: Any) -> Written | None:
    """The note on something, if it has one."""
    note: Written | None = getattr(holder, _NOTE, None)
    return note
