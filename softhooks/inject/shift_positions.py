"""Pass the positions of the text to a stack, shifted by the length of a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.position_table import set_table_positions
from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError


def set_position_ids(stack: Stack, call: dict[str, Any], ids: Tensor, handles: list[Any]) -> None:
    """Pass a stack the position ids of its columns, either in the call or through a hook on its position table.

    Args:
        call: the arguments of the forward; changed in place if the stack takes `position_ids`.
        ids: the ids in the stack's own numbering, [B or 1, T]; [T] for a table that gives all rows the same positions.
        handles: the list to which the handle of the hook is added.
    """
    if stack.positions.takes_position_ids:
        call["position_ids"] = ids
    elif stack.positions.table is not None:
        handles.append(set_table_positions(stack.positions.table, ids))


def needs_position_ids(stack: Stack, shift: int | Tensor) -> bool:
    """Whether the positions of the text must be passed to a stack.

    The decoder of an encoder-decoder with a position table counts its own columns, which is right without a shift.
    """
    where = stack.positions
    counts_itself = stack.name == "decoder" and isinstance(shift, int) and shift == 0
    return where.takes_position_ids or (where.table is not None and not counts_itself)


def shift_positions(
    stack: Stack, call: dict[str, Any], shift: int | Tensor, positions: Tensor, mask: Tensor | None, handles: list[Any]
) -> None:
    """Shift the positions of a call's text by `shift`, compared to a call without a prompt.

    Args:
        call: the arguments of the forward, changed in place.
        shift: an int, or [B, 1] if rows differ.
        positions: the text's positions without a prompt, counted from 0, [B or 1, T], or [A, B, T] for several axes (M-RoPE).
        mask: 1 for real tokens, [B, past + T], or None if all are real.
        handles: the list to which the handles of hooks for this forward are added.
    """
    where = stack.positions
    ids = positions + where.start + (shift.to(positions.device) if isinstance(shift, Tensor) else shift)
    if where.padding is not None and mask is not None:
        ids = ids.masked_fill(mask[:, -ids.shape[-1] :] == 0, where.padding)
    if not where.takes_position_ids and where.table is not None:
        if mask is None and isinstance(shift, int) and shift == 0:
            return  # the table's own positions are right
        if not where.table.by_row:
            ids = _common_positions(stack, ids, mask)
    set_position_ids(stack, call, ids, handles)


def _common_positions(stack: Stack, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions that all rows share, [B or 1, T] -> [T]; the positions of padding do not matter.

    Raises:
        UnsupportedModeError: the rows have different positions.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[-1] :].bool().to(ids.device)
    common = torch.where(real, ids, 0).amax(0)
    if bool((real & (ids != common)).any()):
        raise UnsupportedModeError(
            f"{type(stack.module).__name__} gives all rows of a batch the same positions, but the texts of these {len(ids)} "
            "rows need different ones.",
            "Pad on the right, and run rows with different prompts in separate batches.",
        )
    return common
