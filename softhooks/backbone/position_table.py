"""Choose the positions whose embeddings a position table (a module that embeds positions) returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.stack import PositionTable, Stack
from softhooks.patching.patches import MethodWrapper, Patch, patch


class _FixedPositions:
    """Replaces the forward of a position table; returns the embeddings of fixed positions."""

    def __init__(self, table: PositionTable, ids: Tensor) -> None:
        self._table = table
        self._rows = ids + table.first

    def __call__(self, asked: Any = None, *_args: Any, **_kwargs: Any) -> Tensor:
        return functional.embedding(self._rows_for(asked), getattr(self._table.module, self._table.weight))

    def _rows_for(self, asked: Any) -> Tensor:
        """Return a table row per token; padding that the stack appends (LED pads to whole windows) gets the last token's row."""
        shape = asked.shape if isinstance(asked, Tensor) else asked  # a table is called with ids, or with their shape
        more = shape[1] - self._rows.shape[-1] if isinstance(shape, tuple) and len(shape) > 1 else 0
        if more <= 0:
            return self._rows
        return torch.cat([self._rows, self._rows[..., -1:].expand(*self._rows.shape[:-1], more)], -1)


class PositionedForward(MethodWrapper):
    """Replaces the forward of a stack's position table; uses the `table_positions` of the pass that this thread is running."""

    def __init__(self, stack: Stack, table: PositionTable) -> None:
        super().__init__(table.module, "forward")
        self.stack = stack
        self.table = table

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the embeddings of the pass's positions, or of the positions that the stack asks for."""
        current = self.stack.state.current
        if current is None or current.table_positions is None:
            return super().__call__(*args, **kwargs)
        return _FixedPositions(self.table, current.table_positions)(*args, **kwargs)


def set_table_positions(table: PositionTable, ids: Tensor) -> Patch:
    """Make a position table return the embeddings of given positions in all threads, until `remove()` is called on the result.

    The whole forward is replaced, because the original fails if a padded row has more tokens than the table has rows.

    Args:
        ids: the positions, counted from 0, [B, T], or [T] for all rows.
    """
    return patch(table.module, "forward", _FixedPositions(table, ids))
