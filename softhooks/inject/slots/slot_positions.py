"""Compute the positions of slots and text in one sequence, in the stack's own numbering."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.layout.layout import text_positions
from softhooks.layout.slot_map import Widened


def positions_of(stack: Stack, mask: Tensor) -> Tensor:
    """Return the position id of each column in the stack's own numbering. [B, N] -> [B, N]."""
    positions = stack.positions
    ids = text_positions(mask) + positions.start
    return ids if positions.padding is None else ids.masked_fill(mask == 0, positions.padding)


def widened_positions(stack: Stack, given: Tensor | None, mask: Tensor, wide: Widened, wide_mask: Tensor) -> Tensor:
    """Return the position ids of a sequence with slots. Slots count like text, and the first position is the caller's.

    Args:
        given: the caller's position ids of the text, [B or 1, T] or [A, B, T], or None to count by the mask.
        mask: the mask of the text's columns, [B, T].
        wide, wide_mask: the map of the sequence with slots, and its mask, [B, N].

    Shape:
        -> [B, N], or [A, B, N] if positions have several axes (M-RoPE).

    Raises:
        UnsupportedModeError: positions restart within a row, or belong to an image before a slot.
    """
    own = positions_of(stack, wide_mask)
    if given is None:
        return own
    real = mask.bool()
    offset = given - text_positions(mask) - stack.positions.start
    first = offset.gather(-1, real.long().argmax(-1, keepdim=True).expand(*offset.shape[:-1], 1))
    # A plain count from any start is recounted with the slots.
    if bool(((offset == first) | ~real).all()):
        return own + first if bool(first.any()) or given.dim() > 2 else own
    # Any other positions, such as an image's, are shifted as a whole if all slots are before the text.
    before = torch.where(wide.live, wide.slots, 0).amax(-1) < torch.where(real, wide.text, wide.columns).amin(-1)
    if given.dim() == 2 or not bool(before.all()):
        raise UnsupportedModeError(
            f"`position_ids` {list(given.shape)} are not the count of the attention mask; each row has its slots only once, so "
            "positions must count each row's text in steps of one.",
            "Put each document into its own row; before images, use `placement='front'`, or a prompt that enters as keys and "
            "values.",
        )
    moved = given + wide.live.sum(-1, keepdim=True)
    return own.expand(*given.shape[:-1], -1).scatter(-1, wide.text.expand_as(moved), moved)
