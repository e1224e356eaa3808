"""Remove the slots from the output of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.probing import last_hidden_state
from softhooks.layout.slot_map import Widened, gather_columns

_PER_COLUMN = ("last_hidden_state", "hidden_states", "attentions", "router_logits")


def strip_output(output: Any, wide: Widened, states: Callable[[Tensor], Tensor], keep_last: bool) -> Any:
    """Remove the slots from every tensor of a stack's output that has an entry for each token.

    Args:
        states: the function that removes the slots from states, [B, N, H] -> [B, T, H].
        keep_last: whether the last hidden state keeps its slots.
    """
    if isinstance(output, Tensor):
        return output if keep_last else _strip(output, wide, states)
    if isinstance(output, tuple):
        return tuple(item if keep_last and i == 0 else _strip(item, wide, states) for i, item in enumerate(output))
    for key in _PER_COLUMN:
        if output.get(key) is not None and not (keep_last and key == "last_hidden_state"):
            strip = _strip_streams if key == "hidden_states" else _strip
            output[key] = strip(output[key], wide, states)
    return output


def _strip_streams(layers: Any, wide: Widened, states: Callable[[Tensor], Tensor]) -> Any:
    """Remove the slots from hidden states; those of S streams are [B, N, S, H] (DeepSeek-V4) or [S, B, N, H] (Gemma 3n)."""

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1:3] == (wide.text.shape[0], wide.columns):
            return torch.stack([states(stream) for stream in value])
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == wide.columns:
            return states(value.flatten(2)).unflatten(2, value.shape[2:])
        return _strip(value, wide, states)

    return tuple(map(strip, layers)) if isinstance(layers, (tuple, list)) else strip(layers)


def _strip(value: Any, wide: Widened, states: Callable[[Tensor], Tensor]) -> Any:
    """Remove the slots from states [B, N, H], attentions [B, Hq, N, N], router logits [B * N, E], or a tuple of these."""
    if isinstance(value, (tuple, list)):
        return type(value)(_strip(item, wide, states) for item in value)
    if not isinstance(value, Tensor):
        return value
    batch, columns = wide.text.shape[0], wide.columns
    if value.dim() == 4 and columns in value.shape[2:]:
        for dim in (2, 3):
            value = gather_columns(value, wide.text, dim) if value.shape[dim] == columns else value
        return value
    if value.dim() == 3 and value.shape[1] == columns:
        return states(value)
    if value.dim() == 2 and value.shape[0] == batch * columns:
        return wide.own_states(value.unflatten(0, (batch, columns))).flatten(0, 1)
    return value


def strip_last(output: Any, wide: Widened, states: Callable[[Tensor], Tensor], asked: int) -> Any:
    """Select the states of the last `asked` text tokens if the stack has computed only its last states (`logits_to_keep`)."""
    computed = last_hidden_state(output)
    last = states(functional.pad(computed, (0, 0, wide.columns - computed.shape[1], 0)))[:, -asked:]
    if isinstance(output, tuple):
        return last, *output[1:]
    output["last_hidden_state"] = last
    return output


def strip_attentions(output: Any, wide: Widened) -> Any:
    """Remove the slots' columns from attentions over a cache, [B, Hq, T, K]; a sliding layer has only the last K keys."""

    def strip(weights: Any) -> Any:
        if not isinstance(weights, Tensor):
            return weights
        held = weights.shape[3]
        # Pad on the left to the whole sequence, so that a sliding layer's columns have the same indices as in the map.
        text = gather_columns(functional.pad(weights, (wide.columns - held, 0)), wide.text, 3)
        return text if held == wide.columns else text[..., -held:]

    if isinstance(output, tuple):
        return tuple(tuple(map(strip, item)) if _is_attentions(item, wide.text.shape[0]) else item for item in output)
    if not isinstance(output, Tensor) and output.get("attentions") is not None:
        output["attentions"] = tuple(map(strip, output["attentions"]))
    return output


def _is_attentions(item: Any, batch: int) -> bool:
    first = item[0] if isinstance(item, tuple) and item else None
    return isinstance(first, Tensor) and first.dim() == 4 and first.shape[0] == batch
