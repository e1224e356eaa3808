"""The positions of slots and text in a widened sequence, in the stack's own numbering."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.layout.layout import text_positions
from softhooks.layout.slot_map import Widened


def positions_of(stack: Stack, mask: Tensor) -> Tensor:
    """The ids of each column in the stack's own numbering. [B, N] -> [B, N]."""
    positions = stack.positions
    ids = text_positions(mask) + positions.start
    return ids if positions.padding is None else ids.masked_fill(mask == 0, positions.padding)


def widened_positions(stack: Stack, given: Tensor | None, mask: Tensor, wide: Widened, wide_mask: Tensor) -> Tensor:
    """The ids of each column of a widened sequence: slots take part in each row's count, from where the caller starts it.

    Args:
        given: the text's, as the caller counts them, [B or 1, T] or [A, B, T]; None: by the mask.
        mask: of the text's columns, [B, T].
        wide, wide_mask: the map of the widened sequence, and its mask, [B, N].

    Shape:
        -> [B, N], or [A, B, N] where positions have several axes (M-RoPE).

    Raises:
        UnsupportedModeError: positions start again within a row, or stand for an image that slots stand behind.
    """
    own = positions_of(stack, wide_mask)
    if given is None:
        return own
    real = mask.bool()
    offset = given - text_positions(mask) - stack.positions.start
    first = offset.gather(-1, real.long().argmax(-1, keepdim=True).expand(*offset.shape[:-1], 1))
    if bool(((offset == first) | ~real).all()):
        return own + first if bool(first.any()) or given.dim() > 2 else own
    before = torch.where(wide.live, wide.slots, 0).amax(-1) < torch.where(real, wide.text, wide.columns).amin(-1)
    if given.dim() == 2 or not bool(before.all()):
        raise UnsupportedModeError(
            "slots in the sequence stand once in every row, so positions must count each row's text by one.",
            "Unpack documents into rows of their own; use `placement='front'` before images, or a prompt that enters as "
            "keys and values.",
            position_ids=f"{list(given.shape)}, not the count of the attention mask",
        )
    moved = given + wide.live.sum(-1, keepdim=True)
    return own.expand(*given.shape[:-1], -1).scatter(-1, wide.text.expand_as(moved), moved)
