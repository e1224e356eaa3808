"""The calls that are running on a model: forwards, `generate`, and changes of the model's prompts.

Several threads may run a model at once, because each thread has its own calls, and a call has its own state. An exclusive call
changes the model while it runs, such as `attach`, or a training forward that disables dropout. It waits until no other thread
is running the model, and calls in other threads wait until it ends.

The calls of a thread are in a `threading.local`. A context variable would be inherited by tasks that are started in a forward
and run after it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch

from softhooks.runtime.running_call import Call, is_autograd_thread, this_thread

_POLL = 0.05
"""The number of seconds after which a waiting thread looks for calls that have ended without running their last hook."""


class _OfThread(threading.local):
    """The calls of one thread on one model.

    Attributes:
        innermost: the innermost call, or None.
        active: the name of the prompt that was active when the outermost call began.
    """

    innermost: Call | None = None
    active: str | None = None


class RunningCalls:
    """The calls that are running on one model. A copy of the model starts without calls.

    Args:
        active: see the attribute.

    Attributes:
        active: the name of the active prompt. A call uses the prompt that was active when its outermost call began.
    """

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self._own = _OfThread()
        self._changed = threading.Condition()
        # Held weakly, so that a call that has died in a thread is forgotten with the thread.
        self._outermost: weakref.WeakSet[Call] = weakref.WeakSet()
        self._exclusive: Call | None = None  # the innermost call of the thread that has the model alone
        self._waiting: set[Call] = set()  # the exclusive calls that wait

    def __deepcopy__(self, _memo: dict[int, Any]) -> RunningCalls:
        return RunningCalls(self.active)

    def __reduce__(self) -> tuple[type[RunningCalls], tuple[str | None]]:
        return RunningCalls, (self.active,)

    @property
    def call(self) -> Call | None:
        """The innermost call of this thread, or None if there is none."""
        return self._own.innermost

    @property
    def forward(self) -> Call | None:
        """The forward that is running in this thread."""
        call = self._own.innermost
        return None if call is None else call.forward

    @property
    def active_here(self) -> str | None:
        """The name of the prompt that is active in this thread's call, or would be active in a new one."""
        return self.active if self._own.innermost is None else self._own.active

    def activate(self, name: str | None) -> None:
        """Change the active prompt for calls that begin later, and for the running calls of this thread."""
        self.active = self._own.active = name

    def runs_elsewhere(self) -> bool:
        """Return whether another thread is running the model."""
        with self._changed:
            return any(call.thread is not this_thread() for call in self._outermost)

    # --- beginning and ending a call ----------------------------------------------------------------------------------

    def begin(
        self,
        holder: object,
        what: str,
        frame: FrameType,
        is_model: bool = False,
        is_exclusive: Callable[[], bool] | None = None,
    ) -> Call:
        """Begin a call. If it is the outermost call of this thread, wait for an exclusive call of another thread to end.

        Args:
            is_exclusive: returns whether the call changes the model while it runs. Such a call waits for the calls of all other
                threads to end. None if it never does.

        Raises:
            UnsupportedModeError: the call cannot wait, because it is inside another call or in an autograd thread.
        """
        outer = self._own.innermost
        while outer is not None and not outer.runs_here():  # it ended without running its last hook
            self._leave(outer)
            outer = outer.outer
        if outer is None:
            self._own.active = self.active
        call = Call(holder, what, frame, outer, is_model)
        self._own.innermost = call
        if is_exclusive is None and outer is not None and not outer.is_exclusive:
            return call
        try:
            self._enter(call, is_exclusive)
        except BaseException:
            self._leave(call)
            raise
        return call

    def find(self, holder: object, frame: FrameType) -> Call | None:
        """Return the call that a hook began, or None if it began none."""
        call = self._own.innermost
        while call is not None and not (call.holder is holder and call.frame is frame):
            call = call.outer
        return call

    def end(self, ended: Call) -> None:
        """End a call, and all calls inside it that have not ended."""
        while ended.frame is not None and (call := self._own.innermost) is not None:
            self._leave(call)

    def block(self, what: str, skip_objective: bool = False) -> CallBlock:
        """Return a context manager inside which this thread counts as running the model. Other threads may run it too."""
        return CallBlock(self, what, None, skip_objective)

    def exclusive(self, what: str, is_exclusive: Callable[[], bool] = lambda: True) -> CallBlock:
        """Do the same, but if `is_exclusive` returns True, no other thread may run the model meanwhile."""
        return CallBlock(self, what, is_exclusive, False)

    def _enter(self, call: Call, is_exclusive: Callable[[], bool] | None) -> None:
        outer = call.outer
        if outer is not None:
            call.is_exclusive = outer.is_exclusive
            if call.is_exclusive or (is_exclusive is not None and is_exclusive()):
                with self._changed:
                    if not call.is_exclusive and (other := self._obstacle(True)) is not None:
                        raise other.refusal(call.what)
                    call.is_exclusive, self._exclusive = True, call
            return
        while True:
            wants = is_exclusive is not None and is_exclusive()
            self._wait(call, wants)
            if wants or is_exclusive is None or not is_exclusive():
                return
            self._release(call)  # a prompt was attached while this call waited

    def _wait(self, call: Call, is_exclusive: bool) -> None:
        """Wait until the call may run."""
        with self._changed:
            try:
                if is_exclusive:
                    self._waiting.add(call)
                while (other := self._obstacle(is_exclusive)) is not None or self._gives_way(is_exclusive):
                    if other is not None and is_autograd_thread():
                        # It may not wait: the other thread may need this thread for a backward of its own.
                        raise other.refusal(call.what)
                    self._changed.wait(_POLL)
            finally:
                if is_exclusive:
                    self._waiting.discard(call)
                    self._changed.notify_all()
            self._own.active = self.active  # another thread may have attached a prompt meanwhile
            self._outermost.add(call)
            if is_exclusive:
                call.is_exclusive, self._exclusive = True, call

    def _obstacle(self, is_exclusive: bool) -> Call | None:
        """Return a call of another thread that a call of this thread cannot run beside, or None."""
        while (holder := self._exclusive) is not None and holder.thread is not this_thread() and holder.has_died():
            self._exclusive = holder.exclusive_outer
            self._restore(holder)
        if holder is not None:
            return None if holder.thread is this_thread() or holder.runs_backward_here() else holder
        if not is_exclusive:
            return None
        others = (call for call in list(self._outermost) if call.thread is not this_thread())
        return next((call for call in others if call.runs() and not call.runs_backward_here()), None)

    def _gives_way(self, is_exclusive: bool) -> bool:
        """Whether a new call lets a waiting exclusive call go first. A backward does not: a running call may wait for it."""
        return not is_exclusive and bool(self._waiting) and torch._C._current_graph_task_id() == -1

    def _leave(self, call: Call) -> None:
        """End the innermost call of this thread."""
        self._own.innermost = call.outer
        try:
            call.close()
            self._restore(call)
        finally:
            if call.outer is None or call.is_exclusive:
                self._release(call)

    def _restore(self, call: Call) -> None:
        """Undo the call's changes of the model, unless another thread has already done so."""
        if call.restores:
            with self._changed:
                restores, call.restores = call.restores, []
            while restores:
                restores.pop()()

    def _release(self, call: Call) -> None:
        with self._changed:
            was_exclusive = self._exclusive is call
            if was_exclusive:
                self._exclusive = call.exclusive_outer
            if call.outer is None:
                self._outermost.discard(call)
            if self._waiting or (was_exclusive and self._exclusive is None):
                self._changed.notify_all()


@dataclass(eq=False, repr=False)
class CallBlock:
    """A context manager that is a call on a model."""

    _running: RunningCalls
    _what: str  # the name of the block in error messages
    _is_exclusive: Callable[[], bool] | None
    _skip_objective: bool
    _call: Call | None = None

    def __enter__(self) -> None:
        call = self._running.begin(self, self._what, sys._getframe(1), is_exclusive=self._is_exclusive)
        call.skips_objective, self._call = self._skip_objective, call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Otherwise, block and call would refer to each other, and keep the pass in memory until the garbage collector runs.
        ended, self._call = self._call, None
        if ended is not None:
            self._running.end(ended)
