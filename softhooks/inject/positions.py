"""Where columns stand in a stack's own numbering, told as an argument or at its table."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from softhooks.anatomy import Stack
from softhooks.layout.places import text_positions


def positions_of(stack: Stack, mask: Tensor) -> Tensor:
    """The ids of each column in the stack's own numbering. [B, N] -> [B, N]."""
    positions = stack.positions
    ids = text_positions(mask) + positions.start
    return ids.masked_fill(mask == 0, positions.padding) if positions.start else ids


class _Answer:
    """A learned position table that takes no ids, made to answer for given ones until it is removed."""

    def __init__(self, table: nn.Embedding, ids: Tensor) -> None:
        self.table = table
        self.ids = ids + int(getattr(table, "offset", 0))
        self.before = table.__dict__.get("forward")
        table.__dict__["forward"] = self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return functional.embedding(self.ids, self.table.weight)

    def remove(self) -> None:
        del self.table.__dict__["forward"]
        if self.before is not None:
            self.table.__dict__["forward"] = self.before


def place_at_table(table: nn.Embedding, ids: Tensor, handles: list[Any]) -> None:
    """Make a learned position table that takes no ids answer for these, until the handles are removed.

    In its forward's place, for that fails on padded rows with more columns than positions.
    """
    handles.append(_Answer(table, ids))
