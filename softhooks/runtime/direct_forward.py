"""Turn direct calls to `model.forward(...)`, which skip all hooks, into `model(...)`, as sentence-transformers needs."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from torch import nn

from softhooks.patching.patches import MethodWrapper
from softhooks.runtime.prompted_model import PromptedModel


class DirectForward(MethodWrapper):
    """Turn a direct call to `model.forward` into `model(...)`; when `model(...)` calls the forward, run the original."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "forward")
        self.names: tuple[str, ...] = getattr(self.before, "names", ())
        self.__signature__ = inspect.signature(model.forward)
        # The ids of the threads that have called `model(...)` and have not reached the forward yet.
        self._called_in: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle."""
        return self.__dict__ | {"_called_in": set()}

    def enter(self, _module: nn.Module, _args: Any) -> None:
        """Record that this thread called `model(...)`; this is the last hook before the forward."""
        self._called_in.add(threading.get_ident())

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forget this thread's call, if an error in another hook kept it from reaching the forward."""
        self._called_in.discard(threading.get_ident())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, which runs its hooks; if the hooks have already run, call the original forward."""
        if threading.get_ident() not in self._called_in:
            return self.model(*args, **kwargs)
        self._called_in.discard(threading.get_ident())
        return super().__call__(*args, **kwargs)


def route_direct_calls(prompted: PromptedModel) -> None:
    """Make direct calls to `model.forward` use the prompts."""
    if not any(isinstance(value, DirectForward) for value in prompted.patches.values()):
        model = prompted.model
        direct = DirectForward(model)
        prompted.patches.set(model, "forward", direct)
        prompted.patches.keep(model.register_forward_pre_hook(direct.enter))
        prompted.patches.keep(model.register_forward_hook(direct.leave, always_call=True))
