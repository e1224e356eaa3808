"""Pass a stack the position ids of a text that follows a prefix, or of a text with slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.text_positions import prepared_mask, text_shape
from softhooks.layout.layout import text_positions
from softhooks.layout.slot_map import Widened


def set_position_ids(stack: Stack, call: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Pass position ids to a stack in the call; if the stack has a position table, return them for `Pass.table_positions`.

    Args:
        call: the arguments of the forward; changed in place if the stack takes `position_ids`.
        ids: the ids, which are `stack.positions.start` for the first token of a sequence, [B or 1, T]; [T] for a table that gives
            all rows the same positions.
    """
    if not stack.positions.takes_position_ids:
        return None if stack.positions.table is None else ids
    if stack.positions.for_each_row and ids.dim() == 2:
        ids = ids.expand(text_shape(call)[0], -1)
    call["position_ids"] = ids
    return None


# --- after a prefix ---------------------------------------------------------------------------------------------------


def needs_position_ids(stack: Stack, shift: int | Tensor) -> bool:
    """Whether softhooks must pass the text's positions to a stack.

    In an encoder-decoder, a decoder with a position table numbers its tokens itself; this is right if nothing is shifted.
    """
    where = stack.positions
    counts_itself = stack.name == "decoder" and isinstance(shift, int) and shift == 0
    return where.takes_position_ids or (where.table is not None and not counts_itself)


def shift_positions(
    stack: Stack, call: dict[str, Any], shift: int | Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Pass a stack the positions of the text, increased by the length of a prefix; see `set_position_ids`.

    Args:
        call: the arguments of the forward, changed in place.
        shift: the number to add to the positions, an int, or [B, 1] if rows differ.
        positions: the text's positions without a prompt, counted from 0, [B or 1, T], or [A, B, T] for several axes (M-RoPE).
        mask: 1 for real tokens, [B, past + T], or None if all are real.
    """
    where = stack.positions
    ids = positions + where.start + (shift.to(positions.device) if isinstance(shift, Tensor) else shift)
    if where.padding is not None and mask is not None:
        ids = ids.masked_fill(mask[:, -ids.shape[-1] :] == 0, where.padding)
    if not where.takes_position_ids and where.table is not None:
        if mask is None and isinstance(shift, int) and shift == 0 and prepared_mask(call) is None:
            return None  # the table's own positions are right
        if not where.table.by_row:
            ids = _common_positions(stack, ids, mask)
    return set_position_ids(stack, call, ids)


def _common_positions(stack: Stack, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions that all rows share, [B or 1, T] -> [T]; the positions of padding do not matter."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[-1] :].bool().to(ids.device)
    common = torch.where(real, ids, 0).amax(0)
    if bool((real & (ids != common)).any()):
        raise UnsupportedModeError(
            f"{type(stack.module).__name__} gives all rows of a batch the same positions, but the texts of these {len(ids)} "
            "rows need different ones.",
            "Pad on the right, and run rows with different prompts in separate batches.",
        )
    return common


# --- with slots -------------------------------------------------------------------------------------------------------


def positions_of(stack: Stack, mask: Tensor) -> Tensor:
    """Return the position ids that number the real tokens of a mask from `stack.positions.start`. [B, N] -> [B, N]."""
    positions = stack.positions
    ids = text_positions(mask) + positions.start
    return ids if positions.padding is None else ids.masked_fill(mask == 0, positions.padding)


def widened_positions(stack: Stack, given: Tensor | None, mask: Tensor, wide: Widened, wide_mask: Tensor) -> Tensor:
    """Return the position ids of a sequence with slots, [B, N], or [A, B, N] for several axes (M-RoPE).

    Slots and text are counted together, from the caller's first position.

    Args:
        given: the caller's position ids of the text, [B or 1, T] or [A, B, T], or None to number the real tokens.
        mask: the mask of the text, [B, T].
        wide: where text and slots are in the sequence.
        wide_mask: the mask of the sequence with slots, [B, N].
    """
    own = positions_of(stack, wide_mask)
    if given is None:
        return own
    real = mask.bool()
    offset, first = _offsets(stack, given, mask)
    # Positions that count up in steps of one, from any start, are recounted with the slots.
    if bool(((offset == first) | ~real).all()):
        # Padding keeps its own: `generate` numbers RoBERTa's tokens from 0, less than padding's position.
        return torch.where(wide_mask.bool(), own + first, own) if bool(first.any()) or given.dim() > 2 else own
    # Any other positions, such as an image's, are shifted as a whole if all slots are before the text.
    before = torch.where(wide.live, wide.slots, 0).amax(-1) < torch.where(real, wide.text, wide.columns).amin(-1)
    if given.dim() == 2 or not bool(before.all()):
        raise UnsupportedModeError(
            f"`position_ids` {list(given.shape)} do not count each row's tokens in steps of one; with slots they must, because "
            "slots are inserted once per row, not once per document.",
            "Put each document into its own row; for images, use `placement='front'`, or a prompt that enters as keys and "
            "values.",
        )
    moved = given + wide.live.sum(-1, keepdim=True)
    return own.expand(*given.shape[:-1], -1).scatter(-1, wide.text.expand_as(moved), moved)


def first_offset(stack: Stack, given: Tensor | None, mask: Tensor) -> Tensor | None:
    """Return the position id of each row's first real token minus the model's first position id, [B, 1]; None if all are 0.

    Args:
        given: the caller's position ids, [B or 1, T]; None, also for positions with several axes (M-RoPE), gives None.
        mask: the mask of the text, [B, T].
    """
    if given is None or given.dim() != 2:
        return None
    first = _offsets(stack, given, mask)[1]
    return first if bool(first.any()) else None


def _offsets(stack: Stack, given: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compare position ids with a count of the real tokens. -> the difference at each token, and at each row's first real one."""
    offset = given - text_positions(mask) - stack.positions.start
    return offset, offset.gather(-1, mask.long().argmax(-1, keepdim=True).expand(*offset.shape[:-1], 1))
