"""A call in a thread of its own that stops inside a module's forward until it is released."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

PATIENCE = 300


def answer(call: Callable[[], Any]) -> Any:
    """The result or the error of a call; a thread has its own gradient mode."""
    try:
        with torch.no_grad():
            return call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return error


class Paused:
    """Start a call in another thread; the `with` block runs while the call is stopped in the forward of a module.

    Args:
        call: what the thread calls.
        module: where it stops; None: the call stops by itself, in `stop`.
        before: stop before the module's forward instead of after it.

    Attributes:
        reached: whether it has stopped there; some modules are never called.
        result: what the call has returned, or its error, after the block.
    """

    def __init__(self, call: Callable[[], Any], module: Any = None, before: bool = False) -> None:
        self.reached = False
        self.result: Any = None
        self._call = call
        self._handle: Any = None
        if module is not None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            self._handle = register(self.stop)
        self._stopped, self._goes_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="first")

    def stop(self, *_call: Any) -> None:
        """Stop the thread, once."""
        if threading.current_thread() is self._thread and not self.reached:
            self.reached = True
            self._stopped.set()
            assert self._goes_on.wait(PATIENCE)

    def _run(self) -> None:
        self.result = answer(self._call)
        self._stopped.set()

    def __enter__(self) -> Paused:
        self._thread.start()
        assert self._stopped.wait(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._goes_on.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._handle is not None:
            self._handle.remove()
