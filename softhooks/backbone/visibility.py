"""Measure whether a stack is causal: whether earlier states change with later tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import recorded_states, relative_difference
from softhooks.backbone.stack_state import StackState


def change_before(
    module: nn.Module, column: int, forwards: Sequence[Callable[[], object]], state: StackState | None = None
) -> float:
    """Measure by how much a stack's states before a column differ between two texts.

    Args:
        module: the module of the stack.
        column: the column from which on the texts differ.
        forwards: one forward for each text, or one with both texts as its rows.
        state: the stack's state, if prompts may be on.

    Returns:
        the largest difference, relative to the largest state.
    """
    rows: list[Tensor] = []
    with recorded_states(module, state) as states:
        for forward in forwards:
            forward()
            rows.append(states[-1][:, :column])
    first, second = torch.cat(rows).chunk(2)
    return relative_difference(second, first)


def is_rounding(change: float, dtype: torch.dtype) -> bool:
    """Whether a relative change is as small as that of another order of summation."""
    return change <= max(1e-5, 8 * torch.finfo(dtype).eps)
