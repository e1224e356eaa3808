"""The map between the columns of a text and the columns of the same text with slots inserted.

Names: B rows, T text columns, S slot columns, N = T + S columns in all. The place of a slot is the number of real tokens before
the slot in its row, so left, right and no padding are the same case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """The place of each slot in each row.

    Attributes:
        offsets: the number of real tokens before each slot, [B, S].
        live: which slots are in use, [B, S] bool; rows with a shorter prompt have spare slots.
    """

    offsets: Tensor
    live: Tensor


def gaps(mask: Tensor, offsets: Tensor) -> Tensor:
    """Find the text column before which each slot is inserted (T for a slot after all columns).

    A slot comes directly after the last token before it, or directly before the row's first token if there is no such token.

    Shape:
        mask [B, T], offsets [B, S] -> [B, S]
    """
    counted = mask.bool().long().cumsum(-1)
    last = torch.searchsorted(counted, offsets.clamp(min=1).contiguous())
    return (last + (offsets > 0)).clamp_(max=mask.shape[1])


@dataclass(frozen=True)
class Widened:
    """The map from the text's columns to the columns of the widened sequence, which also contains the slots.

    Attributes:
        text: the widened column of each text column, [B, T].
        slots: the widened column of each slot, [B, S].
        live: which slots are in use, [B, S] bool.
        predicting: for each text column, the widened column that predicts the next token, [B, T]: the last slot before the next
            text column, or else the column itself.
    """

    text: Tensor
    slots: Tensor
    live: Tensor
    predicting: Tensor

    @property
    def columns(self) -> int:
        """The number of columns of the widened sequence (N)."""
        return self.text.shape[1] + self.slots.shape[1]

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Move the values of text columns to the widened columns; slots get `fill`. [B, T, ...] -> [B, N, ...]."""
        wide = values.new_full((values.shape[0], self.columns, *values.shape[2:]), fill)
        index = _match(self.text, values)
        return wide.scatter(1, index, values)

    def spread_mask(self, mask: Tensor) -> Tensor:
        """Widen a mask: slots in use are visible, spare slots are not. [B, T] -> [B, N]."""
        wide = mask.new_zeros(mask.shape[0], self.columns)
        wide = wide.scatter(1, self.text, mask)
        return wide.scatter(1, self.slots, self.live.to(mask.dtype))

    def own_states(self, states: Tensor) -> Tensor:
        """Select the state of each text column. [B, N, H] -> [B, T, H]."""
        return states.gather(1, _match(self.text, states))

    def predicting_states(self, states: Tensor, mask: Tensor) -> Tensor:
        """Select for each text column the state that predicts the next token, which is a slot's if slots come before that token.

        Padding keeps its own state, so that the columns before a row's first token do not change.

        Shape:
            states [B, N, H], mask [B, T] -> [B, T, H]
        """
        index = torch.where(mask.bool(), self.predicting, self.text)
        return states.gather(1, _match(index, states))


def widen(before: Tensor, live: Tensor, text_columns: int, spare_first: bool = False) -> Widened:
    """Insert each slot before its text column; spare slots are moved to an end of the row, like padding.

    Slots before the same column keep their order.

    Args:
        before: the text column before which each slot is inserted, or T after all columns, [B, S].
        live: which slots are in use, [B, S] bool.
        text_columns: T.
        spare_first: put spare slots at the left, because in `generate` new tokens must directly follow the text.
    """
    batch, slots = before.shape
    used = live.long()
    filled = torch.zeros(batch, text_columns + 1, dtype=torch.long, device=before.device)
    passed = filled.scatter_add(1, before, used).cumsum(-1)  # the number of slots in use up to each gap
    count = used.sum(-1, keepdim=True)
    left = slots - count if spare_first else torch.zeros_like(count)
    text = left + torch.arange(text_columns, device=before.device) + passed[:, :-1]
    order = torch.arange(slots, device=before.device).expand(batch, -1)
    rank = torch.where(live, before, text_columns + 1) * slots + order  # sorts by gap, then by slot; spare slots last
    place = torch.empty_like(rank).scatter(1, rank.argsort(-1), order)
    spare = place - count + (0 if spare_first else text_columns + count)
    following = left + torch.arange(1, text_columns + 1, device=before.device) + passed[:, 1:]
    return Widened(
        text=text, slots=torch.where(live, left + before + place, spare), live=live, predicting=following - 1
    )


def _match(index: Tensor, values: Tensor) -> Tensor:
    """Expand an index [B, K] to the trailing dimensions of `values`, without a copy."""
    for _ in range(values.dim() - 2):
        index = index.unsqueeze(-1)
    return index.expand(*index.shape[:2], *values.shape[2:])
