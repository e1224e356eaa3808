"""Attach a prompt while nobody else runs the model: a forward in another thread would meet probes and half of the hooks."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.runtime.running import refusal

P = ParamSpec("P")
R = TypeVar("R")
WHAT = "`attach` or `load`"


def exclusive(change: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Run a function that changes a model, its first argument, while other threads are refused.

    It raises UnsupportedModeError where another thread runs the model already.
    """

    @functools.wraps(change)
    def alone(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        present = prompted_model_of(model)
        if present is not None:
            with present.running.exclusive(WHAT):
                return change(model, *args, **kwargs)
        if not isinstance(model, nn.Module):
            return change(model, *args, **kwargs)
        with ExitStack() as guards:
            guard = _Guard()
            for module in _entries(model):
                guards.callback(module.register_forward_pre_hook(guard.refuse).remove)
            _require_idle(model)
            return change(model, *args, **kwargs)

    return alone


class _Guard:
    """Refuses the forwards of other threads, before there are hooks that would."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()

    def refuse(self, _module: nn.Module, _args: Any) -> None:
        """Refuse a forward of another thread."""
        if threading.get_ident() != self.ident:
            raise refusal(WHAT, self.ident)


def _entries(model: nn.Module) -> list[nn.Module]:
    """What a user may call of a model: itself, and whatever holds layers."""
    return [
        module
        for module in model.modules()
        if module is model
        or (
            not isinstance(module, nn.ModuleList) and any(isinstance(part, nn.ModuleList) for part in module.children())
        )
    ]


def _require_idle(model: nn.Module) -> None:
    """Check that no other thread is in a forward of a model that has no hooks yet.

    Raises:
        UnsupportedModeError: one is.
    """
    modules = {id(module) for module in model.modules()}
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in modules:
                raise refusal("a forward without a prompt", ident)
            frame = frame.f_back  # type: ignore[assignment]
