"""Patches of a Trainer that attach a prompt to the models from `model_init` and limit their optimizers to its parameters.

The Trainer calls no event between `model_init` and the loading of a checkpoint. Therefore the callback finds its Trainer among
the callers of the current event, and replaces two methods of that instance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches
from softhooks.trainer.checkpoint import saver_of
from softhooks.trainer.optimizer import is_mended, mend_optimizer
from softhooks.trainer.prompt_checks import TrainingCallback

if TYPE_CHECKING:
    from transformers import Trainer


class PatchedTrainer:
    """Replaces `call_model_init` and `create_optimizer` of one Trainer; inactive once the callback is removed from the Trainer.

    Args:
        trainer: the Trainer.
        callback: the callback that attaches the prompt to each model.
    """

    def __init__(self, trainer: Trainer, callback: TrainingCallback) -> None:
        self._trainer = trainer
        self.callback = callback
        self._call_model_init = trainer.call_model_init
        self._create_optimizer = trainer.create_optimizer
        self._patches = Patches()
        self._patches.set(trainer, "call_model_init", self)
        self._patches.set(trainer, "create_optimizer", self.create_optimizer)

    def __call__(self, trial: Any = None) -> nn.Module:
        """Call the original method, and attach the prompt before a checkpoint is loaded and the optimizer is created."""
        model = self._call_model_init(trial)
        if has_callback(self._trainer, self.callback):
            self.callback.on_model_init(self._trainer.args, self._trainer.control, model, trial)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer and make it hold exactly the prompt's parameters, including in subclasses that create their own.

        Raises:
            TrainerError: the callback was removed from the Trainer, but its prompt was not removed from the model.
        """
        is_active = has_callback(self._trainer, self.callback)
        if self._has_prompt() and not is_active:
            _refuse_without_callback(self.callback)
        made = self._create_optimizer(*args, **kwargs)
        prompt, optimizer = self.callback.soft_prompt, self._trainer.optimizer
        is_ours = is_active and self._has_prompt() and optimizer is not None
        if prompt is not None and is_ours and not is_mended(optimizer, prompt):
            mend_optimizer(optimizer, prompt)
        return made

    def _has_prompt(self) -> bool:
        """Whether the Trainer's model has the callback's prompt."""
        prompt = self.callback.soft_prompt
        return prompt is not None and prompt.is_attached and prompt.model is self._trainer.model


def patch_trainer(callback: TrainingCallback) -> Trainer | None:
    """Return the Trainer that is calling the callback, or None if there is none; patch it if that was not done before."""
    trainer = find_trainer(callback)
    if trainer is not None:
        patched = trainer.__dict__.get("call_model_init")
        if not (isinstance(patched, PatchedTrainer) and patched.callback is callback):
            PatchedTrainer(trainer, callback)
    return trainer


def find_trainer(callback: TrainingCallback) -> Trainer | None:
    """Find the Trainer with this callback among the callers of this function."""
    from transformers import Trainer

    for frame in callers():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and has_callback(found, callback):
            return found
    return None


def callers() -> Iterator[FrameType]:
    """Yield the frames of the running calls, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def has_callback(trainer: Trainer, callback: TrainingCallback) -> bool:
    """Whether a Trainer has a callback; False while the Trainer is still being created."""
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(one is callback for one in handler.callbacks)


def _refuse_without_callback(callback: TrainingCallback) -> None:
    """Refuse to train a prompt without its callback, because nothing would check gradients, checkpoints or the base.

    Raises:
        TrainerError: no other callback has taken over the prompt.
    """
    prompt = callback.soft_prompt
    saver = None if prompt is None else saver_of(prompt.model)
    if saver is not None and saver.owner is callback:
        raise TrainerError(
            f"the callback of the prompt {callback.name!r} was removed from the Trainer, but the prompt is still on the model.",
            "Remove the prompt too (`callback.soft_prompt.remove()`), or add the callback again.",
        )
