"""Check after each optimizer step that some optimizer holds the parameters of the trained prompts.

The check is a global torch hook on all optimizers, installed while any model has a prompt.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softhooks.backbone.added_vocabulary import stack_level
from softhooks.errors import TrainerError, format_message
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.runtime.attached_prompt import AttachedPrompt


class TrainedModel(Protocol):
    """The attributes of a `PromptedModel` that the check uses."""

    model: nn.Module

    def active_prompts(self) -> list[AttachedPrompt]:
        """Return the active prompts."""


_held_elsewhere: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[AttachedPrompt]] = weakref.WeakKeyDictionary()
"""For each optimizer, the prompts that were already checked at one of its steps."""


def _listen(patches: Patches) -> None:
    if not patches:
        patches.keep(register_optimizer_step_post_hook(_after_step))


checked_models: SharedPatches[TrainedModel] = SharedPatches(_listen)
"""The models that have a prompt."""


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for model in checked_models:
        reached = [prompt for prompt in model.active_prompts() if _with_gradient(prompt)]
        if any(prompt not in _held_elsewhere.get(optimizer, ()) for prompt in reached):
            _require_held(model, optimizer, reached)


def _held(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require_held(model: TrainedModel, optimizer: Optimizer, reached: list[AttachedPrompt]) -> None:
    """Raise a TrainerError if a prompt has gradients but is in no optimizer; only warn if the step trains other parameters."""
    held = {id(parameter) for parameter in _held(optimizer)}
    own = [parameter for parameter in model.model.parameters() if id(parameter) in held]
    if not own:
        return
    forgotten = [prompt for prompt in reached if not _is_held(prompt, optimizer)]
    _held_elsewhere.setdefault(optimizer, weakref.WeakSet()).update(reached)
    if not forgotten:
        return
    trains = any(parameter.grad is not None for parameter in own)
    sentence = format_message(
        "the prompt has gradients, but no optimizer holds its parameters, "
        + ("so the prompt is not trained." if trains else "so this step trains nothing."),
        "Make the optimizer after `softhooks.attach`, from `prompt.parameters()`.",
        optimizer=f"{type(optimizer).__name__} with {len(own)} parameters of {type(model.model).__name__}",
        prompt=", ".join(repr(prompt.name) for prompt in forgotten),
    )
    if not trains:
        del _held_elsewhere[optimizer]  # raise again at the next step
        raise TrainerError(sentence)
    warnings.warn(sentence, UserWarning, stacklevel=stack_level())


def _is_held(prompt: AttachedPrompt, first: Optimizer) -> bool:
    """Return whether any existing optimizer holds a parameter of the prompt that has a gradient."""
    wanted = set(map(id, _with_gradient(prompt)))
    if any(id(parameter) in wanted for parameter in _held(first)):
        return True
    others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer))
    return any(id(parameter) in wanted for other in others for parameter in _held(other))


def _with_gradient(prompt: AttachedPrompt) -> list[nn.Parameter]:
    return [parameter for parameter in prompt.module.parameters() if parameter.grad is not None]
