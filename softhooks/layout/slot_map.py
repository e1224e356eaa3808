"""The map between a text and the same text with slots in it: pure functions on masks and offsets.

Names: B rows, T text columns, S slot columns, N = T + S columns in all. Slots are inserted *between* the text's columns, so
left, right and no padding are one case: a slot stands behind so many real tokens of its row, wherever its padding is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where each slot of each row stands.

    Attributes:
        offsets: how many of its row's real tokens stand before a slot, [B, S].
        live: which slots are in use, [B, S] bool; a row with a shorter prompt has spare ones.
    """

    offsets: Tensor
    live: Tensor


def gaps(mask: Tensor, offsets: Tensor) -> Tensor:
    """Find the text column that each slot stands before (T: behind all of them).

    A slot with tokens before it stands right behind the last of them; one without stands right before the row's first token.

    Shape:
        mask [B, T], offsets [B, S] -> [B, S]
    """
    counted = mask.bool().long().cumsum(-1)
    last = torch.searchsorted(counted, offsets.clamp(min=1).contiguous())
    return (last + (offsets > 0)).clamp_(max=mask.shape[1])


@dataclass(frozen=True)
class Widened:
    """The map between the text's columns and the widened sequence's.

    Attributes:
        text: the widened column of each text column, [B, T].
        slots: the widened column of each slot, [B, S].
        live: which slots are in use, [B, S] bool.
        predicting: the widened column whose state predicts what follows each text column: its last slot before the next text
            column, or its own, [B, T].
    """

    text: Tensor
    slots: Tensor
    live: Tensor
    predicting: Tensor

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
        index = torch.where(mask.bool(), self.predicting, self.text)
        return states.gather(1, _match(index, states))


def widen(before: Tensor, live: Tensor, text_columns: int, spare_first: bool = False) -> Widened:
    """Insert each slot before its text column; spare slots go behind everything, or before, like padding.

    Slots that stand before one column keep their order.

    Args:
        before: the text column that each slot stands before, T for none, [B, S].
        live: which slots are in use, [B, S] bool.
        text_columns: T.
        spare_first: put spare slots at the left, where they stand between nothing: what is generated follows the text.
    """
    batch, slots = before.shape
    used = live.long()
    filled = torch.zeros(batch, text_columns + 1, dtype=torch.long, device=before.device)
    passed = filled.scatter_add(1, before, used).cumsum(-1)  # slots in use up to each gap
    count = used.sum(-1, keepdim=True)
    left = slots - count if spare_first else torch.zeros_like(count)
    text = left + torch.arange(text_columns, device=before.device) + passed[:, :-1]
    order = torch.arange(slots, device=before.device).expand(batch, -1)
    rank = torch.where(live, before, text_columns + 1) * slots + order  # by gap, then in order; spare ones last
    place = torch.empty_like(rank).scatter(1, rank.argsort(-1), order)
    spare = place - count + (0 if spare_first else text_columns + count)
    following = left + torch.arange(1, text_columns + 1, device=before.device) + passed[:, 1:]
    return Widened(
        text=text, slots=torch.where(live, left + before + place, spare), live=live, predicting=following - 1
    )


def _match(index: Tensor, values: Tensor) -> Tensor:
    """Give an index [B, K] the trailing dimensions of `values`, without a copy."""
    for _ in range(values.dim() - 2):
        index = index.unsqueeze(-1)
    return index.expand(*index.shape[:2], *values.shape[2:])
