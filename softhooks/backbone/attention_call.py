"""How to call an attention module on states that stand at no position."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class AttentionCall:
    """How to call a site's attention module for rows that stand nowhere.

    Attributes:
        width: H, of the rows.
        query_heads: Hq.
        args, kwargs: the arguments of the call; the rows stand where None is at `place`.
        place: which argument the rows are, by number or by name.
        failure: why the site cannot be given rows; empty if it can.
    """

    width: int
    query_heads: int
    args: list[Any]
    kwargs: dict[str, Any]
    place: int | str
    failure: str = ""

    def arguments(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for rows, [N, H]."""
        args = [_to_device_of(value, rows) for value in self.args]
        kwargs = {name: _to_device_of(value, rows) for name, value in self.kwargs.items()}
        if isinstance(self.place, int):
            args[self.place] = rows[:, None]
        else:
            kwargs[self.place] = rows[:, None]
        return args, kwargs


def _to_device_of(value: Any, rows: Tensor) -> Any:
    """Bring an argument to where the rows are; what a layer may write to is copied."""
    if isinstance(value, Tensor):
        return value.to(rows) if value.is_floating_point() else value.to(rows.device)
    if isinstance(value, tuple):
        return tuple(_to_device_of(part, rows) for part in value)
    return copy.copy(value) if isinstance(value, dict) else value
