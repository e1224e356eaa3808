"""Snapshots of everything that a prompt could change on a model and on transformers, to compare later."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from softhooks.backbone import attention_interface


@functools.cache
def leave_libraries_alone() -> None:
    """Exclude the libraries' objects from garbage collection, which accelerate runs at each start of a training (0.3 s each)."""
    gc.collect()
    gc.freeze()


def remove_all() -> None:
    """Remove the prompts that a test has left attached, so that the next test starts with a clean transformers."""
    gc.collect()
    for user in attention_interface.users:
        for prompt in list(getattr(user, "prompts", {}).values()):
            prompt.remove()
    attention_interface.users.discard(remove_all)


def _plain(value: Any) -> Any:
    """One attribute of a module in a comparable form: containers item by item, all else by identity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return frozenset(map(repr, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """The state of a model by name: bits, flags, modes, `__dict__`s with all hooks, config, attention functions."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = (tensor.dtype, tuple(tensor.shape), tensor.detach().clone())
        found[f"requires_grad {name}"] = tensor.requires_grad
    found["state dict"] = list(model.state_dict())
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[f"{name}.__dict__[{key}]"] = _plain(value)
    config = getattr(model, "config", None)
    found["config"] = None if config is None else config.to_dict()
    found["attention"] = {key: id(value) for key, value in AttentionInterface._global_mapping.items()}
    for module in model.modules():
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        found[f"eager {type(module).__module__}"] = id(function)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which two snapshots differ."""
    differing = sorted(set(before) ^ set(after))
    for key in set(before) & set(after):
        old, new = before[key], after[key]
        if key.startswith("tensor "):
            if old[:2] != new[:2] or not same_bits(old[2], new[2]):
                differing.append(key)
        elif old != new:
            differing.append(key)
    return differing


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit; NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Fail if anything about a model differs after the block, also if the block raises."""
    before = snapshot(model)
    try:
        yield
    finally:
        found = differences(before, snapshot(model))
        assert not found, f"changed: {found}"
