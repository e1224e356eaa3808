"""Where virtual slots stand among the text: pure functions on masks and positions.

Names: B rows, T text columns, S slot columns, N = T + S columns in all. Slots are inserted *between* the text's columns, so
left, right and no padding are one case: a slot that stands "at the front" stands before a row's first real token, not before
its padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Placement = Literal["front", "after_first", "end"]


def text_positions(mask: Tensor) -> Tensor:
    """Count each column's position from the mask, so that padding does not move the text.

    Args:
        mask: 1 for a real column, 0 for padding.

    Shape:
        [B, T] -> [B, T]; padding gets the position of the last real column before it, or 0.
    """
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


def gap_before(mask: Tensor, placement: Placement) -> Tensor:
    """Find, for each row, the text column that the slots stand before (T: after all of them).

    Shape:
        mask [B, T] -> [B]
    """
    real = mask.bool()
    columns = torch.arange(real.shape[1], device=real.device)
    if placement == "end":
        last = torch.where(real, columns, -1).amax(-1)
        return last + 1
    first = torch.where(real, columns, real.shape[1]).amin(-1)
    if placement == "after_first":
        first = first + 1
    return first.clamp(max=real.shape[1])


@dataclass(frozen=True)
class Widened:
    """The map between the text's columns and the widened sequence's.

    Attributes:
        text: the widened column of each text column, [B, T].
        slots: the widened column of each slot, [B, S].
        live: which slots are in use, [B, S] bool; a row with a shorter prompt has spare ones.
    """

    text: Tensor
    slots: Tensor
    live: Tensor

    @property
    def columns(self) -> int:
        """The width N of the widened sequence."""
        return self.text.shape[1] + self.slots.shape[1]

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Move per-text values to the widened columns; slots get `fill`. [B, T, ...] -> [B, N, ...]."""
        wide = values.new_full((values.shape[0], self.columns, *values.shape[2:]), fill)
        index = _match(self.text, values)
        return wide.scatter(1, index, values)

    def spread_mask(self, mask: Tensor) -> Tensor:
        """Widen a mask: slots in use are visible, spare ones are not. [B, T] -> [B, N]."""
        wide = mask.new_zeros(mask.shape[0], self.columns)
        wide = wide.scatter(1, self.text, mask)
        return wide.scatter(1, self.slots, self.live.to(mask.dtype))

    def own_states(self, states: Tensor) -> Tensor:
        """Keep each text column's own state. [B, N, H] -> [B, T, H]."""
        return states.gather(1, _match(self.text, states))

    def predicting_states(self, states: Tensor, mask: Tensor) -> Tensor:
        """Keep the state that predicts the next text token: the last slot before it, if slots stand between.

        Padding keeps its own state, so that what precedes a row's first token stays what it was.

        Shape:
            states [B, N, H], mask [B, T] -> [B, T, H]
        """
        following = torch.cat([self.text[:, 1:], self.text.new_full((self.text.shape[0], 1), self.columns)], dim=1)
        inserted = (self.slots[:, None, :] > self.text[:, :, None]) & (self.slots[:, None, :] < following[:, :, None])
        inserted = inserted & self.live[:, None, :] & mask.bool()[:, :, None]
        last_slot = torch.where(inserted, self.slots[:, None, :], -1).amax(-1)
        return states.gather(1, _match(torch.maximum(self.text, last_slot), states))


def widen(before: Tensor, text_columns: int, lengths: Tensor, slot_columns: int, spare_first: bool = False) -> Widened:
    """Insert each row's slots before one of its text columns; spare slots go behind everything, or before, like padding.

    Args:
        before: the text column that the slots stand before, [B].
        text_columns: T.
        lengths: how many of the slots each row uses, [B].
        slot_columns: S, the longest row's slots.
        spare_first: put spare slots at the left, where they stand between nothing: what is generated follows the text.
    """
    columns = torch.arange(text_columns, device=before.device)
    slots = torch.arange(slot_columns, device=before.device)
    used = lengths[:, None]
    live = slots < used
    left = slot_columns - used if spare_first else torch.zeros_like(used)
    spare = slots - used if spare_first else text_columns + slots
    return Widened(
        text=left + columns + used * (columns >= before[:, None]),
        slots=torch.where(live, left + before[:, None] + slots, spare),
        live=live,
    )


def _match(index: Tensor, values: Tensor) -> Tensor:
    """Give an index [B, K] the trailing dimensions of `values`, without a copy."""
    for _ in range(values.dim() - 2):
        index = index.unsqueeze(-1)
    return index.expand(*index.shape[:2], *values.shape[2:])
