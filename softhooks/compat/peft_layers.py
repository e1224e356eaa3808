"""PEFT's adapter layers in a base model: find out whether cached keys and values are still valid."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from softhooks.errors import UnsupportedModeError

_PER_ROW = ("adapter_names", "alora_offsets")
"""The arguments that hooks of PEFT pass to its layers if each row has its own adapter."""


def adapter_state(module: nn.Module, model: nn.Module) -> tuple[Any, ...]:
    """Return the active adapters and their scales in a module of `model`; PEFT changes both without changing a tensor.

    Raises:
        UnsupportedModeError: the rows of this forward pass have different adapters.
    """
    state = []
    for layer in _layers(module):
        _require_one_for_all_rows(layer, model)
        own = layer.__dict__
        scaling, active = own.get("scaling"), own.get("_active_adapter", ())
        scales = tuple(map(repr, scaling.items())) if isinstance(scaling, dict) else ()
        active = (active,) if isinstance(active, str) else tuple(active)
        state.append((bool(own.get("_disable_adapters")), active, scales))
    return tuple(state)


def _layers(module: nn.Module) -> list[nn.Module]:
    """List the PEFT layers in a module. This runs for each token, so each class is inspected only once."""
    if "peft" not in sys.modules:
        return []
    found: list[nn.Module] = []
    is_peft: dict[type[nn.Module], bool] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        kind = type(part)
        if kind not in is_peft:
            is_peft[kind] = isinstance(getattr(kind, "disable_adapters", None), property)  # in models, a method
        if is_peft[kind]:
            found.append(part)
        waiting += part._modules.values()
    return found


def _per_row(hook: Any) -> str | None:
    keywords = getattr(hook, "keywords", None) or {}
    return next((name for name in _PER_ROW if keywords.get(name) is not None), None)


def _require_one_for_all_rows(layer: nn.Module, model: nn.Module) -> None:
    for hook in layer._forward_pre_hooks.values():
        given = _per_row(hook)
        if given is not None:
            _remove_hooks(model)
            raise UnsupportedModeError(
                f"`{given}` gives each row its own adapter, but the keys and values of a prompt are computed once for all rows.",
                "Attach the prompt with `injection='slots'`, or call the model once for each adapter.",
                layer=type(layer).__name__,
            )


def _remove_hooks(model: nn.Module) -> None:
    """Remove PEFT's hooks for this forward pass, because PEFT does not remove them after an error."""
    for layer in _layers(model):
        for number in [number for number, hook in layer._forward_pre_hooks.items() if _per_row(hook) is not None]:
            del layer._forward_pre_hooks[number]
            layer._forward_pre_hooks_with_kwargs.pop(number, None)
