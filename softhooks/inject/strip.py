"""Bring what a stack returns back to the text's columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.layout import Widened


def strip_output(output: Any, wide: Widened, strip: Any, keep_last: bool) -> Any:
    """Bring every per-column tensor of a stack's output back to the text's columns."""

    def attention(weights: Any) -> Any:
        if not isinstance(weights, Tensor) or weights.dim() != 4:
            return weights
        queries = weights if weights.shape[2] != wide.columns else _gather(weights, wide.text, 2)
        return queries if queries.shape[3] != wide.columns else _gather(queries, wide.text, 3)

    def states(value: Any) -> Any:
        return (
            strip(value) if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == wide.columns else value
        )

    if isinstance(output, Tensor):
        return output if keep_last else states(output)
    if isinstance(output, tuple):
        return tuple(item if keep_last and i == 0 else states(item) for i, item in enumerate(output))
    for key, value in list(output.items()):
        if key == "last_hidden_state":
            output[key] = value if keep_last else states(value)
        elif key == "hidden_states" and value is not None:
            output[key] = tuple(states(item) for item in value)
        elif key == "attentions" and value is not None:
            output[key] = tuple(attention(item) for item in value)
    return output


def _gather(weights: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = [weights.shape[0], 1, 1, 1]
    shape[dim] = index.shape[1]
    target = list(weights.shape)
    target[dim] = index.shape[1]
    return weights.gather(dim, index.view(shape).expand(target))
