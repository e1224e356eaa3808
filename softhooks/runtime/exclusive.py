"""Keep other threads from running a model while a prompt is being attached and only some hooks are installed.

If the model already has a prompt, other threads wait, and `attach` waits for them. Otherwise there is nothing in the model that
could make them wait, so they get an error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial, wraps
from traceback import walk_stack
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from softhooks.errors import UnsupportedModeError
from softhooks.patching.patches import Patches
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.runtime.running_call import thread_name

P = ParamSpec("P")
R = TypeVar("R")
WHAT = "`attach` or `load`"


def exclusive(change: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Keep other threads from running a model while the decorated function, whose first argument is the model, changes it.

    The decorated function raises UnsupportedModeError if the model has no prompt and another thread is running it.
    """

    @wraps(change)
    def run(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        present = prompted_model_of(model)
        if present is not None:
            with present.running.exclusive(WHAT):
                return change(model, *args, **kwargs)
        if not isinstance(model, nn.Module):
            return change(model, *args, **kwargs)
        with Patches() as guards:
            hook = partial(_refuse_others, threading.get_ident())
            for module in _entries(model):
                guards.keep(module.register_forward_pre_hook(hook))
            _require_idle(model)
            return change(model, *args, **kwargs)

    return run


def _refuse_others(ident: int, _module: nn.Module, _args: Any) -> None:
    """Refuse a forward in a thread other than `ident`, the thread that attaches."""
    if threading.get_ident() != ident:
        raise _refusal("is attaching the first prompt of", ident)


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a user may call: the model and every module that has a list of layers."""
    for module in model.modules():
        has_layers = any(isinstance(part, nn.ModuleList) for part in module.children())
        if module is model or (has_layers and not isinstance(module, nn.ModuleList)):
            yield module


def _require_idle(model: nn.Module) -> None:
    """Raise an error if another thread is running the model; the frames of all threads are searched for its forward."""
    modules = {id(module) for module in model.modules()}
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        for one, _ in walk_stack(frame):
            if one.f_code.co_name == "_call_impl" and id(one.f_locals.get("self")) in modules:
                raise _refusal("is running", ident)


def _refusal(found: str, ident: int) -> UnsupportedModeError:
    return UnsupportedModeError(
        f"another thread ({thread_name(ident)}) {found} the model; other threads must not run a model while its first prompt is "
        "being attached.",
        "Attach the first prompt before you start the threads. Later ones may be attached while other threads run the model.",
    )
