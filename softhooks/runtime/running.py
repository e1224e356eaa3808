"""The calls that are running on a model. Only one thread at a time may run a model with prompts; other threads get an error.

The hooks of one forward change the model, so a forward in another thread would see these changes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.errors import UnsupportedModeError
from softhooks.inject.cache_notes import WrittenSlots
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.objectives.base import Finish

_local = threading.local()


def this_thread() -> object:
    """Return an object that identifies this thread. Unlike a thread's id, it is never reused."""
    try:
        token: object = _local.token
    except AttributeError:
        token = _local.token = object()
    return token


def module_call() -> FrameType:
    """Return the frame of the module call (torch's `_call_impl`) that is running the current hook."""
    frame = sys._getframe(2)
    # `torch.compiler.disable` puts frames in between
    while frame.f_back is not None and "_dynamo" in frame.f_code.co_filename:
        frame = frame.f_back
    caller, found = frame, frame
    for _ in range(4):
        if found.f_code.co_name == "_call_impl":
            return found
        if found.f_back is None:
            break
        found = found.f_back
    return caller


@dataclass(eq=False, repr=False)
class Call:
    """A call that is running on a model, and its state.

    Attributes:
        holder: the object that began the call: a hook object or an `ExclusiveBlock`.
        what: the name of the call in error messages.
        frame: the Python frame of the call; it stays on the call stack of its thread until the call ends.
        outer: the surrounding call, or None.
        is_model: whether the call is a forward of the whole model; forwards of stacks inside it share its state.
        is_on: whether prompts are active in the call.
        given: the extra arguments of the forward.
        choices: the number of choices per row (multiple choice); each choice is a row of the stack's batch.
        model_arguments: the masks and position ids that the caller passed, or None in a forward of a stack.
        encoded: the positions of the slots in the encoder states that the decoder attends to.
        batch: the batch size of the first stack that used a prompt, or None before that.
        finish: a function that changes the model's output.
        skips_objective: whether forwards inside the call run without an objective.
        prefilled: the keys and values that the call computed for each prompt, by `id(prompt)`.
        opened: the pass of a stack's forward, or None.
        cleanups: functions that undo the call's changes, to be called in reverse order.
    """

    holder: object
    what: str
    frame: FrameType | None
    outer: Call | None
    is_model: bool
    is_on: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)
    choices: int = 1
    model_arguments: dict[str, Any] | None = None
    encoded: WrittenSlots | None = None
    batch: int | None = None
    finish: Finish | None = None
    skips_objective: bool = False
    prefilled: dict[int, dict[Any, KeyValues]] = field(default_factory=dict)
    opened: Pass | None = None
    cleanups: list[Callable[[], object]] = field(default_factory=list)
    thread: object = field(default_factory=this_thread)
    ident: int = field(default_factory=threading.get_ident)

    @property
    def forward(self) -> Call:
        """The call that stores this forward's state: the model's forward if it contains this stack's forward, else this call."""
        outer = self.outer
        return outer if not self.is_model and outer is not None and outer.is_model else self

    @property
    def runs_without_objective(self) -> bool:
        """Whether a surrounding call skips the objective."""
        return self.outer is not None and (self.outer.skips_objective or self.outer.runs_without_objective)

    def runs(self) -> bool:
        """Return whether the call is still running. After a KeyboardInterrupt, torch skips the hook that would end the call."""
        if self.thread is this_thread():
            return _is_on_stack(self.frame, sys._getframe())
        # Another thread's stack can change during the search and hide the frame, so search twice.
        return any(_is_on_stack(self.frame, sys._current_frames().get(self.ident)) for _ in range(2))

    def refusal(self) -> UnsupportedModeError:
        """Return the error for another thread that calls the model during this call. It names the outermost call."""
        return self.outer.refusal() if self.outer is not None else refusal(self.what, self.ident)

    def close(self) -> None:
        """Undo what the call has changed."""
        self.frame = None
        while self.cleanups:
            self.cleanups.pop()()


def _is_on_stack(wanted: FrameType | None, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def _is_autograd_thread_of(call: Call) -> bool:
    """Return whether this is an autograd thread that runs a backward on behalf of the call's thread."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._current_frames().get(call.ident)
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


class RunningCalls:
    """The nested calls that are running on one model. A copy of the model starts without calls."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._innermost: Call | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> RunningCalls:
        return RunningCalls()

    def __reduce__(self) -> tuple[type[RunningCalls], tuple[()]]:
        return RunningCalls, ()

    @property
    def call(self) -> Call | None:
        """The innermost call, or None if there is none in this thread."""
        call = self._innermost
        return call if call is not None and call.thread is this_thread() else None

    @property
    def forward(self) -> Call | None:
        """The forward that is running in this thread."""
        call = self.call
        return None if call is None else call.forward

    def begin(self, holder: object, what: str, frame: FrameType, is_model: bool = False) -> Call:
        """Begin a call.

        Raises:
            UnsupportedModeError: another thread is running the model.
        """
        with self._lock:
            outer = self._innermost
            while outer is not None and not outer.runs():  # it ended without running its last hook
                self._innermost = outer.outer
                outer.close()
                outer = self._innermost
            if outer is not None and outer.thread is not this_thread() and not _is_autograd_thread_of(outer):
                raise outer.refusal()
            call = self._innermost = Call(holder, what, frame, outer, is_model)
            return call

    def find(self, holder: object, frame: FrameType) -> Call | None:
        """Return the call that a hook began, or None if it began none."""
        call = self._innermost
        while call is not None and not (call.holder is holder and call.frame is frame):
            call = call.outer
        return call

    def end(self, ended: Call) -> None:
        """End a call, and all calls inside it that have not ended."""
        with self._lock:
            while self._innermost is not None and ended.frame is not None:
                call = self._innermost
                self._innermost = call.outer
                call.close()

    def require_free(self) -> None:
        """Raise an UnsupportedModeError if another thread is running the model."""
        call = self._innermost
        if call is not None and call.thread is not this_thread() and call.runs():
            raise call.refusal()

    def exclusive(self, what: str, skip_objective: bool = False) -> ExclusiveBlock:
        """Return a context manager inside which no other thread may run the model."""
        return ExclusiveBlock(self, what, skip_objective)


@dataclass(eq=False, repr=False)
class ExclusiveBlock:
    """A context manager inside which no other thread may run the model."""

    _running: RunningCalls
    _what: str  # the name of the block in error messages
    _skip_objective: bool
    _call: Call | None = None

    def __enter__(self) -> None:
        self._call = self._running.begin(self, self._what, sys._getframe(1))
        self._call.skips_objective = self._skip_objective

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Otherwise, block and call would refer to each other, and keep the pass in memory until the garbage collector runs.
        ended, self._call = self._call, None
        if ended is not None:
            self._running.end(ended)


def refusal(what: str, ident: int) -> UnsupportedModeError:
    """Return the error for a thread that calls a model while `what` is running in the thread `ident`."""
    thread = next((thread.name for thread in threading.enumerate() if thread.ident == ident), "not started by Python")
    return UnsupportedModeError(
        f"another thread ({thread}) is running {what}; a model with a prompt runs one forward at a time.",
        "Call the model under a lock, or give each thread its own copy.",
    )
