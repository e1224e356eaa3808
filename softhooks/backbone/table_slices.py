"""The slices of a prompt's table: the rows or columns that belong to each module of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class TableSlice(NamedTuple):
    """The part of one group of a prompt for one module of the model."""

    name: str
    rows: slice
    columns: slice
    module: nn.Module


def slices_of(parts: Sequence[tuple[str, int, nn.Module]], by_rows: bool = False) -> list[TableSlice]:
    """Divide a group into consecutive slices.

    Args:
        parts: the name, the size and the module of each slice.
        by_rows: whether to divide the rows instead of the columns.
    """
    found, first = [], 0
    for name, size, module in parts:
        own = slice(first, first + size)
        rows, columns = (own, slice(None)) if by_rows else (slice(None), own)
        found.append(TableSlice(name, rows, columns, module))
        first += size
    return found
