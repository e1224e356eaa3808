"""The arguments for calling an attention module on hidden states without positions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class AttentionCall:
    """The arguments that make an attention module compute keys and values of hidden states without rotation or mask.

    Attributes:
        width: the width of the hidden states, H.
        query_heads: the number of query heads, Hq.
        args, kwargs: the arguments of the call, with None instead of the hidden states.
        place: the position or the name of the argument for the hidden states.
        failure: why the module cannot be called with these arguments; empty if it can.
    """

    width: int
    query_heads: int
    args: list[Any]
    kwargs: dict[str, Any]
    place: int | str
    failure: str = ""

    def arguments(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments for hidden states [N, H], each as a sequence of one token."""
        args = [_on_device_of(value, rows) for value in self.args]
        kwargs = {name: _on_device_of(value, rows) for name, value in self.kwargs.items()}
        if isinstance(self.place, int):
            args[self.place] = rows[:, None]
        else:
            kwargs[self.place] = rows[:, None]
        return args, kwargs


def _on_device_of(value: Any, rows: Tensor) -> Any:
    """Move an argument to the device of the rows. A dictionary is copied, because the layer may write to it."""
    if isinstance(value, Tensor):
        return value.to(rows) if value.is_floating_point() else value.to(rows.device)
    if isinstance(value, tuple):
        return tuple(_on_device_of(part, rows) for part in value)
    return copy.copy(value) if isinstance(value, dict) else value
