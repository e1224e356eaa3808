"""Insert slots into the rows of a batch. The text with its slots is called the widened sequence.

A column is an index in the sequence. The text has T columns, including padding, and the widened sequence has N = T + S columns,
of which S are slots. The place of a slot is the number of real tokens (not padding) before it. B is the batch size.
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
        live: which slots are used, [B, S] bool. Rows with fewer than S slots have unused slots.
    """

    offsets: Tensor
    live: Tensor


def gaps(mask: Tensor, offsets: Tensor) -> Tensor:
    """Return the text column before which each slot is inserted, or T for the end. [B, T], [B, S] -> [B, S]."""
    # A slot is inserted directly after the last real token before it, or directly before the row's first real token.
    counted = mask.bool().long().cumsum(-1)
    last = torch.searchsorted(counted, offsets.clamp(min=1).contiguous())
    return (last + (offsets > 0)).clamp_(max=mask.shape[1])


@dataclass(frozen=True)
class Widened:
    """The columns of text and slots in the widened sequence.

    Attributes:
        text: the column of each text token, [B, T].
        slots: the column of each slot, [B, S].
        live: which slots are used, [B, S] bool.
        predicting: the column whose state predicts the token after each text token, [B, T]: the last slot between the two
            tokens, or the text token itself if there is none.
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
        """Copy the values of text tokens into the widened sequence; slots get `fill`. [B, T, ...] -> [B, N, ...]."""
        wide = values.new_full((values.shape[0], self.columns, *values.shape[2:]), fill)
        index = _match(self.text, values)
        return wide.scatter(1, index, values)

    def spread_mask(self, mask: Tensor) -> Tensor:
        """Widen an attention mask; used slots get 1 and unused slots get 0. [B, T] -> [B, N]."""
        wide = mask.new_zeros(mask.shape[0], self.columns)
        wide = wide.scatter(1, self.text, mask)
        return wide.scatter(1, self.slots, self.live.to(mask.dtype))

    def own_states(self, states: Tensor) -> Tensor:
        """Return the state of each text token. [B, N, H] -> [B, T, H]."""
        return states.gather(1, _match(self.text, states))

    def predicting_states(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the state that predicts the token after each text token; see `predicting`. [B, N, H], [B, T] -> [B, T, H]."""
        # Padding keeps its own state; otherwise, left padding could get the state of a slot.
        index = torch.where(mask.bool(), self.predicting, self.text)
        return states.gather(1, _match(index, states))


def widen(before: Tensor, live: Tensor, text_columns: int, spare_first: bool = False) -> Widened:
    """Insert each slot before its text column. Unused slots are put at one end of the row, like padding.

    Args:
        before: the text column before which each slot is inserted, or T for the end, [B, S].
        live: which slots are used, [B, S] bool.
        text_columns: T.
        spare_first: put unused slots at the left end, because `generate` appends tokens at the right end.
    """
    batch, slots = before.shape
    used = live.long()
    filled = torch.zeros(batch, text_columns + 1, dtype=torch.long, device=before.device)
    passed = filled.scatter_add(1, before, used).cumsum(-1)  # the number of used slots up to each gap
    count = used.sum(-1, keepdim=True)
    left = slots - count if spare_first else torch.zeros_like(count)
    text = left + torch.arange(text_columns, device=before.device) + passed[:, :-1]
    order = torch.arange(slots, device=before.device).expand(batch, -1)
    # Sort by column, then by slot; unused slots come last.
    rank = torch.where(live, before, text_columns + 1) * slots + order
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


def gather_columns(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select columns of each row along one dimension. [B, ..., N, ...], index [B, C] -> [B, ..., C, ...]."""
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape
    target = list(tensor.shape)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.to(tensor.device).view(shape).expand(target))
