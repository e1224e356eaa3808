"""The running forward of a stack, and protocols for the classes from other softhooks packages that this module uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from softhooks.patching.patches import Patches


class RunningPass(Protocol):
    """The members of `Pass` that the hooks on a stack's modules use."""

    has_begun: bool
    check_attention: Any
    table_positions: Tensor | None
    allows_checkpointing: bool
    keeps_cache: bool

    @property
    def recomputed_in(self) -> Any:
        """See `Pass.recomputed_in`."""

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

    def block(self, what: str) -> AbstractContextManager[None]: ...

    def exclusive(self, what: str) -> AbstractContextManager[None]: ...


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
    def patches(self) -> Patches: ...

    @property
    def is_in_use(self) -> bool: ...


class StackState:
    """The running forward of a stack; each thread has its own.

    Attributes:
        owner: the `PromptedModel`, or None while the model has no prompt.
    """

    def __init__(self) -> None:
        self.owner: _Owner | None = None
        self._own = threading.local()  # `torch.compile` can trace it, unlike a context variable

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running forwards from copies and pickles."""
        return {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=threading.local())

    @property
    def current(self) -> RunningPass | None:
        """The pass of the forward that this thread is running, or None."""
        return getattr(self._own, "current", None)

    @current.setter
    def current(self, current: RunningPass | None) -> None:
        self._own.current = current

    @contextmanager
    def running(self, forward_pass: RunningPass) -> Iterator[None]:
        """Set `current` to a pass while the `with` block runs."""
        outer, self.current = self.current, forward_pass
        try:
            yield
        finally:
            self.current = outer

    def call(self, what: str, is_exclusive: bool = False) -> AbstractContextManager[None]:
        """Return a context manager inside which this thread counts as running the model.

        Args:
            what: the name of the call in error messages.
            is_exclusive: whether no other thread may run the model meanwhile.
        """
        if self.owner is None:
            return nullcontext()
        running = self.owner.running
        return running.exclusive(what) if is_exclusive else running.block(what)

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
