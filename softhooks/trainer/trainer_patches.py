"""Patches for the Trainer, which would otherwise call a callback too late or not at all.

| patched method | reason |
|---|---|
| `Trainer.call_model_init` | a new model needs its prompt before the Trainer loads a checkpoint |
| `Trainer.create_optimizer` | the optimizer must hold exactly the prompt's parameters |
| `Trainer.create_model_card` | the card must describe the prompt, and not a fine-tuned model |
| `CallbackHandler.add_callback` | a callback added to an existing Trainer has missed `on_init_end`, which attaches the prompt |
| `CallbackHandler.on_log` | in its own `on_log`, a callback would add metrics too late for TensorBoard, W&B and MLflow |

The methods of `Trainer` are patched on one instance. Those of `CallbackHandler` are patched on the class while a
`SoftPromptCallback` exists (`add_callback`) or a callback's prompt is attached (`on_log`).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_callback import CallbackHandler

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.prompt import SoftPrompt
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
from softhooks.trainer.hub import write_trainer_card
from softhooks.trainer.optimizer import is_mended, mend_optimizer
from softhooks.trainer.prompt_checks import TrainingCallback

if TYPE_CHECKING:
    from transformers import Trainer

# --- call_model_init and create_optimizer -----------------------------------------------------------------------------


class PatchedTrainer:
    """Wraps three methods of a Trainer.

    Once the callback is removed from the Trainer, the wrappers only call the original methods. However, if the prompt is still
    attached and no other callback trains it, `create_optimizer` raises an error.
    """

    def __init__(self, trainer: Trainer, callback: TrainingCallback) -> None:
        self._trainer = trainer
        self.callback = callback
        self._call_model_init = trainer.call_model_init
        self._create_optimizer = trainer.create_optimizer
        self._create_model_card = trainer.create_model_card
        self._patches = Patches()
        self._patches.set(trainer, "call_model_init", self)
        self._patches.set(trainer, "create_optimizer", self.create_optimizer)
        self._patches.set(trainer, "create_model_card", self.create_model_card)

    def __call__(self, trial: Any = None) -> nn.Module:
        """Create a model and attach the prompt to it."""
        model = self._call_model_init(trial)
        if _has_callback(self._trainer, self.callback):
            self.callback.on_model_init(self._trainer.args, self._trainer.control, model, trial)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, and correct its parameters if a subclass of Trainer chose others."""
        is_active = _has_callback(self._trainer, self.callback)
        if not is_active and self._attached_prompt() is not None:
            _refuse_without_callback(self.callback)
        made = self._create_optimizer(*args, **kwargs)
        prompt, optimizer = self._attached_prompt(), self._trainer.optimizer
        if is_active and prompt is not None and optimizer is not None and not is_mended(optimizer, prompt):
            mend_optimizer(optimizer, prompt)
        return made

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Create the model card, and replace its text."""
        made = self._create_model_card(*args, **kwargs)
        prompt = self._attached_prompt()
        if prompt is not None and _has_callback(self._trainer, self.callback):
            write_trainer_card(self._trainer, prompt, self.callback.report)
        return made

    def _attached_prompt(self) -> SoftPrompt | None:
        """Return the callback's prompt if it is attached to the Trainer's current model."""
        prompt = self.callback.soft_prompt
        return prompt if prompt is not None and prompt.is_attached and prompt.model is self._trainer.model else None


def _refuse_without_callback(callback: TrainingCallback) -> None:
    """Refuse to train a prompt after its callback was removed, because nothing would check gradients, checkpoints or the base.

    Do nothing if another callback now trains the prompt.
    """
    prompt = callback.soft_prompt
    saver = None if prompt is None else saver_of(prompt.model)
    if saver is not None and saver.owner is callback:
        raise TrainerError(
            f"the callback of the prompt {callback.name!r} was removed from the Trainer, but the prompt is still on the model.",
            "Remove the prompt too (`callback.soft_prompt.remove()`), or add the callback again.",
        )


def patch_trainer(callback: TrainingCallback) -> Trainer | None:
    """Return the Trainer that is calling the callback, or None. The first call patches the Trainer."""
    trainer = trainer_of(callback)
    if trainer is not None:
        patched = trainer.__dict__.get("call_model_init")
        if not (isinstance(patched, PatchedTrainer) and patched.callback is callback):
            PatchedTrainer(trainer, callback)
    return trainer


def trainer_of(callback: TrainingCallback) -> Trainer | None:
    """Find the Trainer with this callback among the callers of this function; None if there is none."""
    from transformers import Trainer

    for frame in _callers():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and _has_callback(found, callback):
            return found
    return None


def _callers() -> Iterator[FrameType]:
    """Yield the frames on the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _has_callback(trainer: Trainer, callback: TrainingCallback) -> bool:
    handler = getattr(trainer, "callback_handler", None)  # None while the Trainer is being created
    return handler is not None and any(one is callback for one in handler.callbacks)


# --- add_callback -----------------------------------------------------------------------------------------------------


def _with_init_event(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_callback(handler: Any, callback: Any) -> None:
        """Add a callback; if it is a SoftPromptCallback and the Trainer already exists, call its `on_init_end`."""
        original(handler, callback)
        added = handler.callbacks[-1]
        # Compare by identity, because some callbacks, such as dataclasses, are not hashable.
        is_ours = any(one is added for one in callbacks)
        if not is_ours or not hasattr(handler, "model"):  # a Trainer that is being created calls `on_init_end` itself
            return
        try:
            _call_init_event(added)
        except BaseException:
            handler.callbacks.remove(added)
            raise

    return add_callback


callbacks: SharedPatches[TrainingCallback] = SharedPatches(
    lambda patches: patches.wrap(CallbackHandler, "add_callback", _with_init_event)
)
"""Every SoftPromptCallback that exists."""


def _call_init_event(callback: TrainingCallback) -> None:
    """Call `on_init_end` of one callback, unless the Trainer is already training."""
    trainer = trainer_of(callback)
    if trainer is None:
        return
    if any(frame.f_locals.get("self") is trainer and frame.f_code.co_name == "train" for frame in _callers()):
        raise TrainerError(
            f"the callback was added at step {trainer.state.global_step}; it must be added before training.",
            "Add the callback before `train()`, or pass it to the Trainer in `callbacks=[...]`.",
        )
    handler: Any = trainer.callback_handler
    handler.model, handler.optimizer = trainer.model, trainer.optimizer
    others, handler.callbacks = handler.callbacks, [callback]
    try:  # through the handler, because its subclasses add arguments
        handler.on_init_end(trainer.args, trainer.state, trainer.control)
    finally:
        handler.callbacks = others


# --- on_log -----------------------------------------------------------------------------------------------------------


class LoggedMetrics:
    """Adds the metrics of a `CheckpointSaver` to the Trainer's logs until `remove` is called."""

    def __init__(self, saver: CheckpointSaver) -> None:
        self._saver = weakref.ref(saver)
        logged_savers.add(saver)

    def remove(self) -> None:
        """Stop logging the metrics. Calling it again does nothing."""
        saver = self._saver()
        if saver is not None:
            logged_savers.discard(saver)


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        """Add the metrics to a training log and to its copy, which the Trainer has already appended to `log_history`."""
        prompted = prompted_model_of(handler.model) if isinstance(handler.model, nn.Module) else None
        saver = None if prompted is None else saver_of(prompted.model)
        if saver is not None and saver.metrics is not None and "loss" in logs:
            metrics = saver.metrics.compute()
            logs.update(metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(metrics)
        return original(handler, args, state, control, logs, **kwargs)

    return on_log


logged_savers: SharedPatches[CheckpointSaver] = SharedPatches(
    lambda patches: patches.wrap(CallbackHandler, "on_log", _with_metrics)
)
"""The savers whose metrics are logged."""
