"""Support for `trainer.add_callback` on a Trainer that already exists.

Such a callback has missed `on_init_end`, in which it attaches its prompt. `CallbackHandler.add_callback` is therefore wrapped
while a `SoftPromptCallback` exists: the wrapper calls `on_init_end` for the added callback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import CallbackHandler

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.trainer.model_init import callers, find_trainer
from softhooks.trainer.prompt_checks import TrainingCallback


def _with_init_event(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_callback(handler: Any, callback: Any) -> None:
        """Add a callback; if it is a SoftPromptCallback and the Trainer already exists, call its `on_init_end`."""
        original(handler, callback)
        added = handler.callbacks[-1]
        is_ours = any(
            one is added for one in users
        )  # compared by identity: callbacks may be unhashable, such as dataclasses
        if not is_ours or not hasattr(
            handler, "model"
        ):  # the Trainer is still being created and will call `on_init_end` itself
            return
        try:
            _call_init_event(added)
        except BaseException:
            handler.callbacks.remove(added)
            raise

    return add_callback


def _wrap_add_callback(patches: Patches) -> None:
    patches.wrap(CallbackHandler, "add_callback", _with_init_event)


users: SharedPatches[TrainingCallback] = SharedPatches(_wrap_add_callback)
"""Every SoftPromptCallback that exists."""


def _call_init_event(callback: TrainingCallback) -> None:
    """Call `on_init_end` of one callback.

    Raises:
        TrainerError: the Trainer is training.
    """
    trainer = find_trainer(callback)
    if trainer is None:
        return
    if any(frame.f_locals.get("self") is trainer and frame.f_code.co_name == "train" for frame in callers()):
        raise TrainerError(
            f"the callback was added during training, at step {trainer.state.global_step}; a prompt must be attached before.",
            "Add the callback before `train()`, or pass it to the Trainer in `callbacks=[...]`.",
        )
    handler: Any = trainer.callback_handler
    handler.model, handler.optimizer = trainer.model, trainer.optimizer
    others, handler.callbacks = handler.callbacks, [callback]
    try:
        handler.on_init_end(
            trainer.args, trainer.state, trainer.control
        )  # through the handler, whose subclasses add arguments
    finally:
        handler.callbacks = others
