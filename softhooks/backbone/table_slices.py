"""Which rows or columns of a prompt's table belong to which module of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class TableSlice(NamedTuple):
    """The part of one group of a prompt that one module of the model receives."""

    name: str
    rows: slice
    columns: slice
    module: nn.Module


def slices_of(parts: Sequence[tuple[str, int, nn.Module]], by_rows: bool = False) -> list[TableSlice]:
    """Divide a group into consecutive slices.

    Args:
        parts: the name, the size and the module of each.
        by_rows: divide the rows, not the columns.
    """
    found, first = [], 0
    for name, size, module in parts:
        own = slice(first, first + size)
        rows, columns = (own, slice(None)) if by_rows else (slice(None), own)
        found.append(TableSlice(name, rows, columns, module))
        first += size
    return found
