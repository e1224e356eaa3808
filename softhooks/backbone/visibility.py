"""What the tokens of a stack see of each other, found by running it: how long a probe must be, and what it compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import first_state

SHORTEST = 24
_LONGEST_REACH = 128
_NAMES = ("window", "chunk", "compress", "conv", "kernel", "topk", "block", "stride", "pool")


def probe_length(module: nn.Module, room: int | None, prompt: int = 0) -> tuple[int, int]:
    """How many columns a probe of a stack takes, and a column before which nothing later may be seen.

    The column stands one before the end of a window, chunk or block: who looks too far ahead looks over it.

    Args:
        room: how many columns the model has positions for; None: as many as it takes.
        prompt: a text longer than the virtual tokens is wanted, within reason.
    """
    reach = reach_of(module)
    columns = max(SHORTEST, 2 * reach + 2, min(prompt + 8, 2 * SHORTEST))
    columns = columns if room is None else max(min(columns, room), 2)
    step = reach if reach < columns else 8
    cut = columns // 2 // step * step or min(step, columns)
    return columns, max(min(cut, columns) - 1, 1)


def reach_of(module: nn.Module) -> int:
    """The common multiple of the short distances that a stack's config names, or the longest of them. At least 8."""
    config = getattr(module, "config", None)
    found = {value for value in _distances(getattr(config, "__dict__", {})) if 2 <= value <= _LONGEST_REACH} | {8}
    multiple = math.lcm(*found)
    return multiple if multiple <= _LONGEST_REACH else max(found)


def _distances(values: dict[Any, Any], named: bool = False) -> Iterator[int]:
    for name, value in values.items():
        fits = named or any(part in str(name) for part in _NAMES)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, dict):
                yield from _distances(one, fits)
            elif fits and isinstance(one, int) and not isinstance(one, bool):
                yield one


def sees_later(stack_module: nn.Module, cut: int, run: Callable[[bool], Any], is_own: Callable[[], bool]) -> float:
    """Run a stack twice, and tell by how much its states before a column move when ids from there on change.

    Args:
        run: a forward of the model; True: with the changed ids.
        is_own: whether the forward of the stack that ends is the text's, not that of a prompt's own rows.

    Returns:
        the largest change as a part of the largest state.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if is_own():
            kept.append(first_state(output)[:, :cut].float())

    handle = stack_module.register_forward_hook(keep)
    try:
        run(False)
        first = kept[-1]
        run(True)
    finally:
        handle.remove()
    return float((first - kept[-1]).abs().max() / first.abs().max().clamp(min=1e-6))


def is_rounding(change: float, dtype: torch.dtype) -> bool:
    """Whether a relative change is no more than what the order of a sum makes."""
    return change <= max(1e-5, 8 * torch.finfo(dtype).eps)
