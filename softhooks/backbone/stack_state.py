"""The running forward of a stack, and protocols for the classes from other softhooks packages that this module uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class RunningPass(Protocol):
    """The members of `Pass` that the hooks on a stack's modules use."""

    thread: int
    has_begun: bool
    check_attention: Any

    def looks_up_text(self, args: tuple[Any, ...]) -> bool:
        """See `Pass.looks_up_text`."""

    def embed(self, output: Tensor) -> Tensor:
        """See `Pass.embed`."""

    def site_for_call(self, site: Any) -> Any:
        """See `Pass.site_for_call`."""

    def enters(self, site: Any) -> bool:
        """See `Pass.enters`."""

    def attend(self, site: Any, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Pass.attend`."""

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """See `Pass.scale`."""


class _ModelForward(Protocol):
    encoded: Any


class _ModelCalls(Protocol):
    """The members of `RunningCalls` that stacks use."""

    @property
    def forward(self) -> _ModelForward | None: ...

    def exclusive(self, what: str) -> AbstractContextManager[None]: ...

    def require_free(self) -> None: ...


class _AttachedPrompt(Protocol):
    @property
    def injection(self) -> str: ...


class _Owner(Protocol):
    """The members of `PromptedModel` that stacks use."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def prompts(self) -> Mapping[str, _AttachedPrompt]: ...

    @property
    def running(self) -> _ModelCalls: ...

    @property
    def is_in_use(self) -> bool: ...


class StackState:
    """The running forward of a stack.

    Attributes:
        owner: the `PromptedModel`, or None while the model has no prompt.
    """

    def __init__(self) -> None:
        self.owner: _Owner | None = None
        self._current: RunningPass | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running forward from copies and pickles."""
        return self.__dict__ | {"_current": None}

    @property
    def current(self) -> RunningPass | None:
        """The pass of the forward that this thread is running, or None."""
        current = self._current
        if current is None or torch.compiler.is_compiling() or current.thread == threading.get_ident():
            return current
        return None

    @current.setter
    def current(self, current: RunningPass | None) -> None:
        self._current = current

    @contextmanager
    def running(self, forward_pass: RunningPass, alone: str = "") -> Iterator[None]:
        """Set `current` to a pass while the `with` block runs.

        Args:
            alone: the name of the block in error messages; if given, no other thread may run the model while the block runs.

        Raises:
            UnsupportedModeError: `alone` is given, but another thread is running the model.
        """
        with self.owner.running.exclusive(alone) if self.owner is not None and alone else nullcontext():
            outer, self._current = self._current, forward_pass
            forward_pass.thread = threading.get_ident()  # backward reruns checkpointed layers in another thread
            try:
                yield
            finally:
                self._current = outer

    @property
    def encoded(self) -> Any:
        """The indices of virtual tokens in the encoder states to which the decoder attends in the running forward."""
        forward = None if self.owner is None else self.owner.running.forward
        return None if forward is None else forward.encoded

    @encoded.setter
    def encoded(self, encoded: Any) -> None:
        forward = None if self.owner is None else self.owner.running.forward
        if forward is not None:
            forward.encoded = encoded
