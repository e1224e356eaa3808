"""What runs on a model: calls inside each other, all of one thread; and the state that belongs to each.

A model's hooks change what its modules do for one forward, so a forward in another thread would meet them. Whoever comes second
is refused, and the first goes on undisturbed.
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
    from softhooks.inject.notes import WrittenSlots
    from softhooks.inject.prefix.key_values import KeyValues
    from softhooks.objectives.base import Finish

_local = threading.local()


def this_thread() -> object:
    """Something that tells this thread from all others; the number of a thread that has ended is given out again."""
    try:
        token: object = _local.token
    except AttributeError:
        token = _local.token = object()
    return token


def module_call() -> FrameType:
    """The frame of the module call whose hook is running: what stands on the thread's stack for as long as that call runs."""
    frame = sys._getframe(2)
    while (
        frame.f_back is not None and "_dynamo" in frame.f_code.co_filename
    ):  # what `torch.compiler.disable` puts between
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
    """A call that runs on a model, and the state that belongs to it.

    Attributes:
        holder: whose it is: the hooks that began it, or what was asked for.
        what: it is called so in errors.
        outer: the call that it runs inside.
        is_model: whether it is a forward of the model, to which its stacks' forwards belong.
        is_on: whether prompts are on in it.
        given: the extra arguments of the forward.
        choices: how many choices each row of the model's batch has, which are rows of their own in a stack.
        brought: its masks and positions, as the caller gave them; None in a stack's forward.
        encoded: where slots stand in the encoder's states that its decoder attends to.
        batch: the rows of the first pass that a prompt was put in by; None until then.
        finish: what an objective makes of its output.
        aside: forwards inside have no objective.
        prefilled: what each prompt has put in, by id, where it was run alone.
        opened: the pass, in a forward of a stack.
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
        self.brought: dict[str, Any] | None = None
        self.encoded: WrittenSlots | None = None
        self.batch: int | None = None
        self.finish: Finish | None = None
        self.aside = False
        self.prefilled: dict[int, dict[Any, KeyValues]] = {}
        self.opened: Pass | None = None
        self.cleanups: list[Callable[[], object]] = []

    @property
    def forward(self) -> Call:
        """The forward that the state of this call belongs to: the model's, if it is a stack's inside."""
        outer = self.outer
        return outer if not self.is_model and outer is not None and outer.is_model else self

    @property
    def is_aside(self) -> bool:
        """Whether the call has no objective."""
        return self.outer is not None and (self.outer.aside or self.outer.is_aside)

    def runs(self) -> bool:
        """Whether the call is still under way: of a KeyboardInterrupt torch tells no hook, and a thread may have ended."""
        if self.thread is this_thread():
            return _stands_on(self.frame, sys._getframe())
        # A stack that moves while it is read could be missed once.
        return any(_stands_on(self.frame, sys._current_frames().get(self.ident)) for _ in range(2))

    def refusal(self) -> UnsupportedModeError:
        """The error of another thread that comes while the call runs; it names the outermost one."""
        return self.outer.refusal() if self.outer is not None else refusal(self.what, self.ident)

    def close(self) -> None:
        """Undo what the call has changed."""
        self.frame = None
        while self.cleanups:
            self.cleanups.pop()()


def _stands_on(wanted: FrameType | None, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def _acts_for(call: Call) -> bool:
    """Whether this is a thread of autograd, which works for a call that waits for its own backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._current_frames().get(call.ident)
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


class RunningCalls:
    """The calls that run on one model, the innermost first. A copy of a model has none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._innermost: Call | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> RunningCalls:
        return RunningCalls()

    def __reduce__(self) -> tuple[type[RunningCalls], tuple[()]]:
        return RunningCalls, ()

    @property
    def call(self) -> Call | None:
        """The innermost call, if it is this thread's."""
        call = self._innermost
        return call if call is not None and call.thread is this_thread() else None

    @property
    def forward(self) -> Call | None:
        """The forward of this thread that is under way."""
        call = self.call
        return None if call is None else call.forward

    def begin(self, holder: object, what: str, frame: FrameType, is_model: bool = False) -> Call:
        """Begin a call, after closing what was left behind by calls that have ended without their last hook.

        Raises:
            UnsupportedModeError: another thread runs the model.
        """
        with self._lock:
            innermost = self._innermost
            while innermost is not None and not innermost.runs():
                self._innermost = innermost.outer
                innermost.close()
                innermost = self._innermost
            if innermost is not None and innermost.thread is not this_thread() and not _acts_for(innermost):
                raise innermost.refusal()
            call = self._innermost = Call(holder, what, frame, innermost, is_model)
            return call

    def find(self, holder: object, frame: FrameType) -> Call | None:
        """The call that a hook has begun; None where it was refused, or is the library's own."""
        call = self._innermost
        while call is not None and not (call.holder is holder and call.frame is frame):
            call = call.outer
        return call

    def end(self, ended: Call) -> None:
        """End a call, and what was left behind inside it."""
        with self._lock:
            while self._innermost is not None and ended.frame is not None:
                call = self._innermost
                self._innermost = call.outer
                call.close()

    def require_free(self) -> None:
        """Check that no other thread runs the model.

        Raises:
            UnsupportedModeError: one does.
        """
        call = self._innermost
        if call is not None and call.thread is not this_thread() and call.runs():
            raise call.refusal()

    def exclusive(self, what: str, aside: bool = False) -> ExclusiveBlock:
        """Keep other threads from running the model, in a `with` block. See `ExclusiveBlock`."""
        return ExclusiveBlock(self, what, aside)


class ExclusiveBlock:
    """A `with` block that nobody else runs the model in.

    Args:
        running: of the model.
        what: the block is called so in errors.
        aside: forwards inside have no objective.
    """

    def __init__(self, running: RunningCalls, what: str, aside: bool = False) -> None:
        self._running = running
        self._what = what
        self._aside = aside
        self._call: Call | None = None

    def __enter__(self) -> None:
        self._call = self._running.begin(self, self._what, sys._getframe(1))
        self._call.aside = self._aside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._call is not None:
            self._running.end(self._call)


def refusal(what: str, ident: int) -> UnsupportedModeError:
    """The error of whoever comes while another thread runs or changes a model.

    Args:
        what: it does.
        ident: its number.
    """
    thread = next((thread.name for thread in threading.enumerate() if thread.ident == ident), "not Python's")
    return UnsupportedModeError(
        "a model with a prompt runs one forward at a time; what it puts in belongs to that one.",
        "Call it under a lock, or give each thread a model of its own.",
        running=f"{what}, in another thread ({thread})",
    )
