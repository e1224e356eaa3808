"""Keep other threads from running a model while a prompt is being attached: they would run with half of the hooks."""

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
    """Decorate a function that changes the model in its first argument: other threads may not run the model meanwhile.

    The wrapped function raises UnsupportedModeError if another thread is already running the model.
    """

    @functools.wraps(change)
    def run(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
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

    return run


class _Guard:
    """A hook that refuses forwards in other threads, for a model without hooks of softhooks."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()

    def refuse(self, _module: nn.Module, _args: Any) -> None:
        """Refuse a forward in another thread."""
        if threading.get_ident() != self.ident:
            raise refusal(WHAT, self.ident)


def _entries(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a user may call: the model and every module that has a list of layers."""
    return [
        module
        for module in model.modules()
        if module is model
        or (
            not isinstance(module, nn.ModuleList) and any(isinstance(part, nn.ModuleList) for part in module.children())
        )
    ]


def _require_idle(model: nn.Module) -> None:
    """Search the frames of all threads for a forward of a model that has no hooks yet.

    Raises:
        UnsupportedModeError: another thread is running the model.
    """
    modules = {id(module) for module in model.modules()}
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in modules:
                raise refusal("a forward without a prompt", ident)
            frame = frame.f_back  # type: ignore[assignment]
