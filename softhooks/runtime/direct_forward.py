"""Route calls of `model.forward(...)`, which skip `__call__` and every hook, through `__call__`.

sentence-transformers makes such calls, so its integration uses this; otherwise such a call is an error.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

from torch import nn

from softhooks.patching.method_wrapper import MethodWrapper
from softhooks.runtime.prompted_model import PromptedModel


class DirectForward(MethodWrapper):
    """Redirects direct calls of `model.forward` to `model(...)`, so that hooks run; inside that call, runs the original."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "forward")
        self.names: tuple[str, ...] = getattr(self.before, "names", ())
        self.__signature__ = inspect.signature(model.forward)
        self._called_in: int | None = None  # the number of the thread that is calling the model

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the running call."""
        return self.__dict__ | {"_called_in": None}

    def enter(self, _module: nn.Module, _args: Any) -> None:
        """Note that the model was called; registered as the last hook before the forward."""
        self._called_in = threading.get_ident()

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forget the call if a hook has raised before the forward, unless it is the call of another thread."""
        if self._called_in == threading.get_ident():
            self._called_in = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward inside a call of the model."""
        if self._called_in != threading.get_ident():
            return self.model(*args, **kwargs)
        self._called_in = None
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def route_direct_calls(prompted: PromptedModel) -> None:
    """Make direct calls of `model.forward` use the prompts, as calls of the model do."""
    if not any(isinstance(value, DirectForward) for value in prompted.patches.values()):
        model = prompted.model
        direct = DirectForward(model)
        prompted.patches.set(model, "forward", direct)
        prompted.patches.keep(model.register_forward_pre_hook(direct.enter))
        prompted.patches.keep(model.register_forward_hook(direct.leave, always_call=True))
