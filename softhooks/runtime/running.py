"""The nested calls that are running on a model, with the state of each. Only one thread at a time may run a model.

The hooks change what a model's modules do during one forward, so a forward in another thread would see those changes. The second
thread gets an error, and the first one is not disturbed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError

if TYPE_CHECKING:
    from softhooks.backbone.forward_pass import Pass
    from softhooks.inject.cache_notes import WrittenSlots
    from softhooks.inject.prefix.key_values import KeyValues
    from softhooks.objectives.base import Finish

_local = threading.local()


def this_thread() -> object:
    """Return an object that identifies this thread and is never reused, unlike the number of a thread that has ended."""
    try:
        token: object = _local.token
    except AttributeError:
        token = _local.token = object()
    return token


def module_call() -> FrameType:
    """Return the frame of the module call that is running the current hook; it stays on the thread's stack during that call."""
    frame = sys._getframe(2)
    while (
        frame.f_back is not None and "_dynamo" in frame.f_code.co_filename
    ):  # frames that `torch.compiler.disable` puts in between
        frame = frame.f_back
    caller, found = frame, frame
    for _ in range(4):
        if found.f_code.co_name == "_call_impl":
            return found
        if found.f_back is None:
            break
        found = found.f_back
    return caller


class Call:
    """A call that is running on a model, and its state.

    Attributes:
        holder: the object that began the call: a hook object or an `ExclusiveBlock`.
        what: the name of the call in errors.
        outer: the surrounding call, or None.
        is_model: whether the call is a forward of the whole model; forwards of stacks inside it use its state.
        is_on: whether prompts are active in the call.
        given: the extra arguments of the forward.
        choices: the number of choices per row (multiple choice); a stack gets each choice as a row.
        model_arguments: the masks and positions that the caller passed, or None in a forward of a stack.
        encoded: the places of virtual slots in the encoder states that the decoder attends to.
        batch: the batch size of the first forward of a stack that used a prompt, or None before that.
        finish: a function of a method's objective that changes the output.
        skips_objective: whether forwards inside the call run without an objective.
        prefilled: the keys and values of each prompt that was run alone, by `id(prompt)`.
        opened: the open pass, in a forward of a stack.
        cleanups: functions that undo what the call has changed, called in reverse order.
    """

    def __init__(self, holder: object, what: str, frame: FrameType, outer: Call | None, is_model: bool) -> None:
        self.holder = holder
        self.what = what
        self.outer = outer
        self.is_model = is_model
        self.thread = this_thread()
        self.ident = threading.get_ident()
        self.frame: FrameType | None = frame
        self.is_on = False
        self.given: dict[str, Tensor] = {}
        self.choices = 1
        self.model_arguments: dict[str, Any] | None = None
        self.encoded: WrittenSlots | None = None
        self.batch: int | None = None
        self.finish: Finish | None = None
        self.skips_objective = False
        self.prefilled: dict[int, dict[Any, KeyValues]] = {}
        self.opened: Pass | None = None
        self.cleanups: list[Callable[[], object]] = []

    @property
    def forward(self) -> Call:
        """The call that holds this forward's state: for a stack's forward, the model's forward around it; otherwise this call."""
        outer = self.outer
        return outer if not self.is_model and outer is not None and outer.is_model else self

    @property
    def runs_without_objective(self) -> bool:
        """Whether the call runs without an objective."""
        return self.outer is not None and (self.outer.skips_objective or self.outer.runs_without_objective)

    def runs(self) -> bool:
        """Return whether the call still runs: torch skips hooks after a KeyboardInterrupt, and the thread may have ended."""
        if self.thread is this_thread():
            return _is_on_stack(self.frame, sys._getframe())
        # The stack of another thread can change during the search, so the frame may be missed.
        return any(_is_on_stack(self.frame, sys._current_frames().get(self.ident)) for _ in range(2))

    def refusal(self) -> UnsupportedModeError:
        """Return the error for another thread that calls the model during this call; it names the outermost call."""
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
    """Return whether this is a thread of autograd that works for a call which is waiting for its backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._current_frames().get(call.ident)
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


class RunningCalls:
    """The calls that are running on one model. A copy of the model starts without calls."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._innermost: Call | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> RunningCalls:
        return RunningCalls()

    def __reduce__(self) -> tuple[type[RunningCalls], tuple[()]]:
        return RunningCalls, ()

    @property
    def call(self) -> Call | None:
        """The innermost call, or None if it runs in another thread."""
        call = self._innermost
        return call if call is not None and call.thread is this_thread() else None

    @property
    def forward(self) -> Call | None:
        """The forward that is running in this thread."""
        call = self.call
        return None if call is None else call.forward

    def begin(self, holder: object, what: str, frame: FrameType, is_model: bool = False) -> Call:
        """Begin a call. Calls that have ended without their last hook are closed first.

        Raises:
            UnsupportedModeError: another thread is running the model.
        """
        with self._lock:
            innermost = self._innermost
            while innermost is not None and not innermost.runs():
                self._innermost = innermost.outer
                innermost.close()
                innermost = self._innermost
            if (
                innermost is not None
                and innermost.thread is not this_thread()
                and not _is_autograd_thread_of(innermost)
            ):
                raise innermost.refusal()
            call = self._innermost = Call(holder, what, frame, innermost, is_model)
            return call

    def find(self, holder: object, frame: FrameType) -> Call | None:
        """Find the call that a hook began, or None if it was refused or is softhooks' own run of the prompt."""
        call = self._innermost
        while call is not None and not (call.holder is holder and call.frame is frame):
            call = call.outer
        return call

    def end(self, ended: Call) -> None:
        """End a call, and any calls inside it that have not ended."""
        with self._lock:
            while self._innermost is not None and ended.frame is not None:
                call = self._innermost
                self._innermost = call.outer
                call.close()

    def require_free(self) -> None:
        """Check that no other thread is running the model.

        Raises:
            UnsupportedModeError: another thread is running the model.
        """
        call = self._innermost
        if call is not None and call.thread is not this_thread() and call.runs():
            raise call.refusal()

    def exclusive(self, what: str, skip_objective: bool = False) -> ExclusiveBlock:
        """Return a `with` block in which no other thread may run the model. See `ExclusiveBlock`."""
        return ExclusiveBlock(self, what, skip_objective)


class ExclusiveBlock:
    """A `with` block in which no other thread may run the model.

    Args:
        running: the calls that are running on the model.
        what: the name of the block in errors.
        skip_objective: whether forwards inside run without an objective.
    """

    def __init__(self, running: RunningCalls, what: str, skip_objective: bool = False) -> None:
        self._running = running
        self._what = what
        self._skip_objective = skip_objective
        self._call: Call | None = None

    def __enter__(self) -> None:
        self._call = self._running.begin(self, self._what, sys._getframe(1))
        self._call.skips_objective = self._skip_objective

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._call is not None:
            self._running.end(self._call)


def refusal(what: str, ident: int) -> UnsupportedModeError:
    """Return the error for a thread that calls a model while another thread runs or changes the model.

    Args:
        what: the call or change that is running in the other thread.
        ident: the other thread's number.
    """
    thread = next((thread.name for thread in threading.enumerate() if thread.ident == ident), "not started by Python")
    return UnsupportedModeError(
        f"another thread ({thread}) is running {what}; a model with a prompt runs one forward at a time.",
        "Call the model under a lock, or give each thread its own copy.",
    )
