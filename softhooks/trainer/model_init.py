"""Prompts that meet their model late: `model_init` makes another in `train()`, `add_callback` comes after construction.

No event tells a callback of either before the Trainer loads a checkpoint and makes its optimizer. So the callback looks once for
the Trainer, among the callers of the event, and stands in on this one instance for the two methods that make the model and the
optimizer. While there is a callback of ours, `CallbackHandler.add_callback` is wrapped; it is put back with the last one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.trainer.checkpoint import saver_of
from softhooks.trainer.optimizer import is_mended, mend_optimizer
from softhooks.trainer.template_rows import mind_rows

if TYPE_CHECKING:
    from transformers import Trainer

    from softhooks.prompt import SoftPrompt
    from softhooks.trainer.callback import SoftPromptCallback


# --- the Trainer ------------------------------------------------------------------------------------------------------


class Meeting:
    """What stands in on a Trainer for `call_model_init` and `create_optimizer`, as long as the callback is among its own.

    Args:
        trainer: the Trainer.
        callback: whose prompt the models that it makes shall carry.
    """

    def __init__(self, trainer: Trainer, callback: SoftPromptCallback) -> None:
        self._trainer = trainer
        self._callback = callback
        self._call_model_init = trainer.call_model_init
        self._create_optimizer = trainer.create_optimizer
        own: dict[str, Any] = trainer.__dict__
        own["call_model_init"], own["create_optimizer"] = self.call_model_init, self.create_optimizer

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, with its prompt: before a checkpoint is loaded into it and its optimizer is made."""
        model = self._call_model_init(trial)
        if _serves(self._callback, self._trainer):
            self._callback.on_model_init(self._trainer.args, self._trainer.control, model, trial)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make an optimizer that holds what is trained and nothing else, also where a script makes its own.

        Raises:
            TrainerError: the callback was taken away, and its prompt was not.
        """
        serves = _serves(self._callback, self._trainer)
        if self._has_prompt() and not serves:
            _refuse_unattended(self._callback)
        made = self._create_optimizer(*args, **kwargs)
        prompt, optimizer = self._callback.soft_prompt, self._trainer.optimizer
        is_ours = serves and self._has_prompt() and optimizer is not None
        if prompt is not None and is_ours and not is_mended(optimizer, prompt):
            mend_optimizer(optimizer, prompt)
        return made

    def _has_prompt(self) -> bool:
        """Whether the model that will train carries the callback's prompt."""
        prompt = self._callback.soft_prompt
        return prompt is not None and prompt.is_attached and prompt.model is self._trainer.model


def meet(callback: SoftPromptCallback) -> None:
    """Stand in for what the Trainer that calls this callback will make."""
    trainer = _trainer_of(callback)
    stands = None if trainer is None else getattr(trainer.__dict__.get("call_model_init"), "__self__", None)
    if trainer is None:
        return
    if not (isinstance(stands, Meeting) and stands._callback is callback):
        Meeting(trainer, callback)
    mind_rows(trainer, callback.method)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _trainer_of(callback: SoftPromptCallback) -> Trainer | None:
    """The Trainer under whose methods this runs, if the callback is among its own."""
    from transformers import Trainer

    for frame in _frames():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and _serves(callback, found):
            return found
    return None


def _serves(callback: SoftPromptCallback, trainer: Trainer) -> bool:
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(one is callback for one in handler.callbacks)


def _refuse_unattended(callback: SoftPromptCallback) -> None:
    """Refuse to train a prompt whose callback is gone: nobody would check its gradients, its checkpoints or the base.

    Raises:
        TrainerError: no other callback has taken the prompt up.
    """
    prompt = callback.soft_prompt
    saver = None if prompt is None else saver_of(prompt.model)
    if saver is not None and saver.owner[0] is callback:
        raise TrainerError(
            "a prompt that a Trainer's callback has attached trains under that callback.",
            "Remove the prompt too (`callback.soft_prompt.remove()`), or add the callback again.",
            removed=f"the callback of {callback.name!r}, after it met the model",
        )


# --- add_callback -----------------------------------------------------------------------------------------------------


def expect(callback: SoftPromptCallback) -> None:
    """Let a callback know of the Trainers that it is added to when they are made already."""
    users.add(callback)


def _introducing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_callback(handler: Any, callback: Any) -> None:
        """Add it; one that comes after the Trainer's construction meets the model now."""
        original(handler, callback)
        added = handler.callbacks[-1]
        is_ours = any(one is added for one in users)  # by identity: a stranger's may be unhashable, as a dataclass is
        if not is_ours or not hasattr(handler, "model"):  # a handler in construction: `on_init_end` will follow
            return
        try:
            _introduce(added)
        except BaseException:
            handler.callbacks.remove(added)
            raise

    return add_callback


def _wrap_add_callback(patches: Patches) -> None:
    patches.wrap(CallbackHandler, "add_callback", _introducing)


users: SharedPatches[SoftPromptCallback] = SharedPatches(_wrap_add_callback)
"""The callbacks of ours."""


def _introduce(callback: SoftPromptCallback) -> None:
    """Let the handler tell one callback of the event that it has missed.

    Raises:
        TrainerError: the Trainer is training.
    """
    trainer = _trainer_of(callback)
    if trainer is None:
        return
    if any(frame.f_locals.get("self") is trainer and frame.f_code.co_name == "train" for frame in _frames()):
        raise TrainerError(
            "a prompt must be on the model when its training begins.",
            "Add the callback before `train()`, or pass it to the Trainer in `callbacks=[...]`.",
            added=f"at step {trainer.state.global_step} of a training that is under way",
        )
    handler = trainer.callback_handler
    handler.model, handler.optimizer = trainer.model, trainer.optimizer
    among, handler.callbacks = handler.callbacks, [callback]
    try:
        handler.on_init_end(trainer.args, trainer.state, trainer.control)  # by the handler: some add to what they tell
    finally:
        handler.callbacks = among


# --- too late ---------------------------------------------------------------------------------------------------------


def refuse_late(args: TrainingArguments, state: TrainerState, what: str) -> None:
    """Refuse to attach where a step was taken, where other processes would not follow, or where a checkpoint shall be resumed.

    Raises:
        TrainerError: training is resumed, runs in several processes, or saves checkpoints.
    """
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    reasons = {
        "training is resumed": bool(state.global_step),
        "there are several processes": args.world_size > 1,
        f"checkpoints are saved, which no Trainer would resume from: save_strategy={strategy!r}": strategy != "no",
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise TrainerError(
            "a prompt must be on the model when the Trainer makes its optimizer, so that it is resumed and shared rightly.",
            "Pass `model=` or `model_init=`, and `callbacks=[SoftPromptCallback(...)]`, to the Trainer, or call "
            "`trainer.add_callback` before `train()`; where checkpoints are not needed, set save_strategy='no'.",
            found=what,
            but=reason,
        )


def require_loaded(state: TrainerState, name: str, loaded: bool) -> None:
    """Refuse to go on from a checkpoint that has not brought the prompt.

    Raises:
        TrainerError: naming the step.
    """
    if state.global_step and not loaded:
        raise TrainerError(
            "a resumed run must have loaded its prompt.",
            "Resume from a checkpoint that this callback wrote, under the same name.",
            trained=repr(name),
            resumed=f"at step {state.global_step}, from a checkpoint without a prompt of that name",
        )


def require_present(prompt: SoftPrompt | None, name: str, state: TrainerState) -> SoftPrompt:
    """Refuse a step without the prompt: the whole model would train, or nothing.

    Raises:
        TrainerError: naming the step.
    """
    if prompt is None or not prompt.is_attached:
        raise TrainerError(
            "a prompt must be on the model from the first step of its training to the last.",
            "Pass the callback to the Trainer in `callbacks=[...]`; remove the prompt after `train()`.",
            missing=f"{name!r}, before step {state.global_step + 1}",
        )
    return prompt
