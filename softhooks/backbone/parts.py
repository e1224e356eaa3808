"""The parts of what an encoder computes, and which module of the model each of them serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class Part(NamedTuple):
    """A part of what an encoder computes, that serves one module of the model.

    Attributes:
        rows, columns: where it stands in its group.
    """

    name: str
    rows: slice
    columns: slice
    module: nn.Module


def cut(parts: Sequence[tuple[str, int, nn.Module]], by_rows: bool = False) -> list[Part]:
    """Cut a group into parts that stand side by side, each with its name, its size and the module that it serves."""
    found, first = [], 0
    for name, size, module in parts:
        own = slice(first, first + size)
        found.append(Part(name, own if by_rows else slice(None), slice(None) if by_rows else own, module))
        first += size
    return found
