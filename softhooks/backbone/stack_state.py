"""The state of a stack while a forward runs; `softhooks.backbone.stack` describes the stack itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class RunningPass(Protocol):
    """The methods of a `Pass` that the modules of its stack call: the embedding, the attention and the linear layers."""

    thread: int
    has_begun: bool

    def looks_up_text(self, args: tuple[Any, ...]) -> bool:
        """Whether a call of the embedding looks up the text."""

    def embed(self, output: Tensor) -> Tensor:
        """Change the output of the embedding."""

    def site_for_call(self, site: Any) -> Any:
        """Choose the site of a module's call."""

    def enters(self, site: Any) -> bool:
        """Whether the pass reads or changes the keys and values of a site."""

    def attend(self, site: Any, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a site's attention function."""

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Change the output of a linear layer."""


class ModelForward(Protocol):
    """A forward of the whole model.

    Attributes:
        encoded: the places of the slots in the encoder states that the decoder attends to.
    """

    encoded: Any


class ModelCalls(Protocol):
    """The calls that run on a model."""

    @property
    def forward(self) -> ModelForward | None:
        """The running forward of this thread."""

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """Keep other threads from running the model."""

    def require_free(self) -> None:
        """Check that no other thread runs the model."""


class AttachedPrompt(Protocol):
    """A prompt of the model."""

    @property
    def injection(self) -> str:
        """How the prompt enters the model."""


class Owner(Protocol):
    """The attributes of a model's prompts that its stacks use."""

    @property
    def model(self) -> nn.Module:
        """The model as the user passed it."""

    @property
    def prompts(self) -> Mapping[str, AttachedPrompt]:
        """The prompts by name."""

    @property
    def running(self) -> ModelCalls:
        """The calls that run on the model."""

    @property
    def is_in_use(self) -> bool:
        """Whether a forward started now would use a prompt in any row."""


class StackState:
    """The running forward of a stack, and the prompts of its model.

    Attributes:
        owner: the prompts of the model, or None while it has none.
    """

    def __init__(self) -> None:
        self.owner: Owner | None = None
        self._current: RunningPass | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the running forward out of copies and pickles."""
        return self.__dict__ | {"_current": None}

    @property
    def current(self) -> RunningPass | None:
        """The pass of this thread's running forward, or None if none is running; attention and embedding read it."""
        current = self._current
        if current is None or torch.compiler.is_compiling() or current.thread == threading.get_ident():
            return current
        return None

    @current.setter
    def current(self, current: RunningPass | None) -> None:
        self._current = current

    @contextmanager
    def running(self, forward_pass: RunningPass, alone: str = "") -> Iterator[None]:
        """Run the modules of the stack inside a pass while the `with` block runs.

        Args:
            alone: a description of the block for errors, if no other thread may run the model meanwhile.

        Raises:
            UnsupportedModeError: another thread is running the model, and the block must run alone.
        """
        with self.owner.running.exclusive(alone) if self.owner is not None and alone else nullcontext():
            outer, self._current = self._current, forward_pass
            forward_pass.thread = threading.get_ident()  # a backward reruns layers in an autograd thread
            try:
                yield
            finally:
                self._current = outer

    @property
    def encoded(self) -> Any:
        """The places of the slots in the encoder states that the decoder attends to in the running forward."""
        forward = None if self.owner is None else self.owner.running.forward
        return None if forward is None else forward.encoded

    @encoded.setter
    def encoded(self, encoded: Any) -> None:
        forward = None if self.owner is None else self.owner.running.forward
        if forward is not None:
            forward.encoded = encoded
