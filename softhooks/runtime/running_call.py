"""A call that is running on a model (a forward, `generate`, ...), and the state that belongs to it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
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
        holder: the object that began the call: a hook object or a `CallBlock`.
        what: the name of the call in error messages.
        frame: the Python frame of the call; it stays on the call stack of its thread until the call ends. Then it is None.
        outer: the surrounding call in the same thread, or None.
        is_model: whether the call is a forward of the whole model; forwards of stacks inside it share its state.
        is_exclusive: whether no other thread may run the model during the call.
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
        cleanups: functions that end what the call has begun in its thread, to be called in reverse order.
        restores: functions that undo the call's changes of the model, to be called in reverse order.
    """

    holder: object
    what: str
    frame: FrameType | None
    outer: Call | None
    is_model: bool = False
    is_exclusive: bool = False
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
    restores: list[Callable[[], object]] = field(default_factory=list)
    thread: object = field(default_factory=this_thread)
    ident: int = field(default_factory=threading.get_ident)

    @property
    def forward(self) -> Call:
        """The call that stores this forward's state: the model's forward if it contains this stack's forward, else this call."""
        outer = self.outer
        return outer if not self.is_model and outer is not None and outer.is_model else self

    @property
    def exclusive_outer(self) -> Call | None:
        """The surrounding call, if it is exclusive too: the exclusion goes on after the end of this call."""
        return self.outer if self.outer is not None and self.outer.is_exclusive else None

    @property
    def runs_without_objective(self) -> bool:
        """Whether a surrounding call skips the objective."""
        return self.outer is not None and (self.outer.skips_objective or self.outer.runs_without_objective)

    def runs(self) -> bool:
        """Return whether a call of another thread is still running."""
        # After a KeyboardInterrupt, torch skips the hook that would end the call, so the frame decides.
        frame = self.frame
        # Another thread's stack can change during the search and hide the frame, so search twice.
        return frame is not None and any(_is_on_stack(frame, sys._current_frames().get(self.ident)) for _ in range(2))

    def has_died(self) -> bool:
        """Return whether the call of another thread has ended without its last hook; False while its thread is ending it."""
        frame = self.frame
        return frame is not None and not self.runs() and self.frame is frame

    def runs_here(self) -> bool:
        """Return whether a call of this thread is still running."""
        return self.frame is not None and _is_on_stack(self.frame, sys._getframe())

    def runs_backward_here(self) -> bool:
        """Return whether this is an autograd thread that runs a backward on behalf of the call's thread."""
        if torch._C._current_graph_task_id() == -1:
            return False
        frame = sys._current_frames().get(self.ident)
        return frame is not None and frame.f_code.co_name == "_engine_run_backward"

    def refusal(self, what: str) -> UnsupportedModeError:
        """Return the error for `what`, which cannot run beside this call and cannot wait for its end."""
        call = self
        while call.outer is not None:
            call = call.outer
        return UnsupportedModeError(
            f"{what} cannot run while another thread ({thread_name(self.ident)}) is running {call.what}, and cannot wait for its "
            "end inside a forward or a backward.",
            "Run the two one after the other; outside of forwards and backwards, the second one waits.",
        )

    def close(self) -> None:
        """End what the call has begun in this thread."""
        self.frame = None
        while self.cleanups:
            self.cleanups.pop()()


def _is_on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def thread_name(ident: int) -> str:
    """Return the name of a thread for messages."""
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), "not started by Python")


def is_autograd_thread() -> bool:
    """Return whether this is a thread of torch that runs a backward, and not the thread that called `backward`."""
    return torch._C._current_graph_task_id() != -1 and threading.get_ident() not in threading._active  # type: ignore[attr-defined]
