"""Adapters of PEFT on a base: what a forward of theirs depends on beside tensors."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from softhooks.errors import UnsupportedModeError

_PER_ROW = ("adapter_names", "alora_offsets")
"""What PEFT hands to its layers for the rows of one forward, in hooks that last as long as that forward."""


def switches(module: nn.Module, model: nn.Module) -> tuple[Any, ...]:
    """Tell which adapters in a module are on, and how strong: `disable_adapter`, `set_adapter` and `set_scale` move no tensor.

    Args:
        model: the model that holds the module, for hooks to be removed from.

    Raises:
        UnsupportedModeError: each row of this forward has an adapter of its own, and what asks is the same for all rows.
    """
    found = []
    for layer in _layers(module):
        own = layer.__dict__
        _require_one_for_all(layer, model)
        scaling = own.get("scaling")
        strengths = tuple(scaling.items()) if isinstance(scaling, dict) else ()
        active = own.get("_active_adapter", ())
        active = (active,) if isinstance(active, str) else tuple(active)
        found.append((bool(own.get("_disable_adapters")), active, tuple(map(repr, strengths))))
    return tuple(found)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of PEFT in a module: this is asked once a token, and each class is looked at once."""
    if "peft" not in sys.modules:
        return []
    found: list[nn.Module] = []
    kinds: dict[type[nn.Module], bool] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        kind = type(part)
        if kind not in kinds:
            kinds[kind] = isinstance(getattr(kind, "disable_adapters", None), property)  # in models it is a method
        if kinds[kind]:
            found.append(part)
        waiting += part._modules.values()
    return found


def _per_row(hook: Any) -> str | None:
    """What a hook hands over for each row, if it does."""
    keywords = getattr(hook, "keywords", None) or {}
    return next((name for name in _PER_ROW if keywords.get(name) is not None), None)


def _require_one_for_all(layer: nn.Module, model: nn.Module) -> None:
    for hook in layer._forward_pre_hooks.values():
        given = _per_row(hook)
        if given is not None:
            _drop_hooks(model)
            raise UnsupportedModeError(
                "keys and values that a prompt has from the base are computed once for all rows, so one adapter of PEFT "
                "must serve them all.",
                "Attach the prompt with `injection='slots'`, or call the model once for each adapter.",
                given=f"`{given}`: an adapter of its own for each row",
                adapters_in=type(layer).__name__,
            )


def _drop_hooks(model: nn.Module) -> None:
    """Take the hooks of this forward away: PEFT would leave them behind an error, and every later forward would meet them."""
    for layer in _layers(model):
        for number in [number for number, hook in layer._forward_pre_hooks.items() if _per_row(hook) is not None]:
            del layer._forward_pre_hooks[number]
            layer._forward_pre_hooks_with_kwargs.pop(number, None)
