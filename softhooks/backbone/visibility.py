"""What the tokens of a stack see of each other, found by running it: how long a probe must be, and what it compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import last_hidden_state


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
            kept.append(last_hidden_state(output)[:, :cut].float())

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
