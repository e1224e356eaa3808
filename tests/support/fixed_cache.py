"""An oracle for gated branches in decoders with a cache: the attention module itself, given only the prompt's keys and values.

The module's output is linear in the values. So a branch adds the module's output for the gated values of the prompt, minus its
output for values of 0. The module itself computes queries, scores and softmax, with one row for each token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class FixedCache:
    """A cache that returns the same keys and values whatever it is given, and records what that was."""

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None) -> None:
        self.fixed = key, value
        self.given: tuple[Tensor, Tensor]

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.given = key, value
        if self.fixed[0] is None or self.fixed[1] is None:
            return key, value
        return tuple(part.expand(len(key), -1, -1, -1).contiguous() for part in self.fixed)  # type: ignore[return-value]

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _single(
    module: nn.Module, call: dict[str, Any], states: Tensor, cache: FixedCache, turned: bool, count: int
) -> Tensor:
    """The module's output for states [N, 1, H], each a sequence of its own that sees `count` keys of a cache.

    Args:
        turned: whether rotary embeddings turn the states by the positions of the call.
    """
    own = dict(call, hidden_states=states)
    named = inspect.signature(type(module).forward).parameters
    own["layer_past" if "layer_past" in named else "past_key_values"] = cache
    heads = getattr(module, "num_heads", 1)
    for name, value in call.items():
        if name == "attention_mask" and value is not None:
            hides = "position_bias" in call  # MPT's mask is True for the keys to hide
            own[name] = value.new_full((len(states), 1, 1, count), value.dtype == torch.bool and not hides)
        elif name == "alibi" and value is not None:
            own[name] = value.new_zeros(len(states) * heads, 1, count)
        elif name == "position_bias":
            own[name] = None
        elif name == "residual":
            own[name] = torch.zeros_like(states)
        elif name == "position_ids" and value is not None:
            wide = value.expand(call["hidden_states"].shape[:2])
            own[name] = wide.reshape(-1, 1) if turned else value.new_zeros(len(states), 1)
        elif name == "position_embeddings" and value is not None:
            wide = [part.expand(call["hidden_states"].shape[0], -1, -1).flatten(0, 1)[:, None] for part in value]
            plain = torch.ones_like(wide[0][:1]), torch.zeros_like(wide[1][:1])
            own[name] = tuple(wide) if turned else plain
    return type(module).forward(module, **own)[0]


def _with_branch(module: nn.Module, rows: Tensor, gates: Tensor, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    output = type(module).forward(module, **call)
    seen = FixedCache()
    _single(module, call, rows[:, None], seen, turned=False, count=1)
    key, value = (part.transpose(0, 2) for part in seen.given)
    states = call["hidden_states"].flatten(0, 1)[:, None]
    parts = [
        _single(module, call, states, FixedCache(key, given), turned=True, count=len(rows))
        for given in (value * gates[:, None, None], torch.zeros_like(value))
    ]
    added = (parts[0] - parts[1]).view_as(call["hidden_states"])
    return output[0] + added, *output[1:]


@contextmanager
def added_branches(modules: list[nn.Module], rows: Tensor, gates: Tensor) -> Iterator[None]:
    """Let each attention module add a branch.

    Args:
        rows: virtual tokens, [L, K, H].
        gates: the gate of each key-value head, [L, Hk].
    """
    with ExitStack() as stack:
        for module, own, gate in zip(modules, rows, gates, strict=True):
            forward = functools.partial(_with_branch, module, own, gate)
            stack.enter_context(mock.patch.dict(module.__dict__, {"forward": forward}))
        yield
