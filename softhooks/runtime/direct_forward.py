"""Callers that run a model's `forward` itself, past `__call__` and every hook: they are sent through `__call__`.

sentence-transformers does so. Only integrations use it (`route_direct_calls`); elsewhere such a call is an error.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from softhooks.runtime.prompted_model import PromptedModel


class DirectForward:
    """A model's own forward, which calls the model where nobody has: then its hooks run, and call this again.

    An object and not a closure, so that a deep copy of the model calls its own forward.

    Args:
        model: whose forward it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: Callable[..., Any] | None = model.__dict__.get("forward")
        self.names: tuple[str, ...] = getattr(self.before, "names", ())
        self.__signature__ = inspect.signature(model.forward)
        self._called_in: int | None = None  # the number of the thread

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: no call is under way in it."""
        return self.__dict__ | {"_called_in": None}

    def enter(self, _module: nn.Module, _args: Any) -> None:
        """Note that the model was called; the last of its hooks before the forward."""
        self._called_in = threading.get_ident()

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forget it, where a hook has raised before the forward; not what another thread's call has noted."""
        if self._called_in == threading.get_ident():
            self._called_in = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, inside a call of the model."""
        if self._called_in != threading.get_ident():
            return self.model(*args, **kwargs)
        self._called_in = None
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def route_direct_calls(prompted: PromptedModel) -> None:
    """Let callers of `model.forward`, who go past every hook, meet the prompts like callers of the model."""
    if not any(isinstance(value, DirectForward) for value in prompted.patches.values()):
        model = prompted.model
        direct = DirectForward(model)
        prompted.patches.set(model, "forward", direct)
        prompted.patches.keep(model.register_forward_pre_hook(direct.enter))
        prompted.patches.keep(model.register_forward_hook(direct.leave, always_call=True))
