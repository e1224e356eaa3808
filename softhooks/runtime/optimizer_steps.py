"""Check at each step of an optimizer that it, or another one, holds the prompt's parameters.

torch reports every step of every optimizer to one hook, which is registered while a prompt is attached anywhere.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softhooks.backbone.added_vocabulary import stack_level
from softhooks.errors import TrainerError, format_message
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.runtime.attached_prompt import AttachedPrompt


class TrainedModel(Protocol):
    """A model with prompts."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    def active_prompts(self) -> list[AttachedPrompt]:
        """The prompts that are on, each once."""


_held_elsewhere: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[AttachedPrompt]] = weakref.WeakKeyDictionary()
"""Of optimizers the prompts that they, or others, hold, as far as that was looked up."""


def _listen(patches: Patches) -> None:
    if not patches:
        patches.keep(register_optimizer_step_post_hook(_after_step))


watched: SharedPatches[TrainedModel] = SharedPatches(_listen)
"""The models whose prompts must be stepped by whoever steps their model."""


def watch_steps(prompted: TrainedModel) -> None:
    """Tell of steps that leave the prompt where it is, until the last prompt is removed."""
    watched.add(prompted)


def unwatch_steps(prompted: TrainedModel) -> None:
    """Let a prompted go; with the last one, the hook."""
    watched.discard(prompted)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for prompted in watched:
        reached = [prompt for prompt in prompted.active_prompts() if _has_gradient(prompt.module.parameters())]
        if any(prompt not in _held_elsewhere.get(optimizer, ()) for prompt in reached):
            _require_held(prompted, optimizer, reached)


def _held(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require_held(prompted: TrainedModel, optimizer: Optimizer, reached: list[AttachedPrompt]) -> None:
    """Refuse a step on a model whose prompt takes gradients and is in no optimizer; warn where it trains something else.

    Raises:
        TrainerError: the step trains nothing.
    """
    held = {id(parameter) for parameter in _held(optimizer)}
    own = [parameter for parameter in prompted.model.parameters() if id(parameter) in held]
    if not own:
        return
    forgotten = [prompt for prompt in reached if not _is_held(prompt, optimizer)]
    _held_elsewhere.setdefault(optimizer, weakref.WeakSet()).update(reached)
    if not forgotten:
        return
    trains = any(parameter.grad is not None for parameter in own)
    sentence = format_message(
        "an optimizer must hold the prompt's parameters; neither this one nor another one does, "
        + ("so the prompt is not trained." if trains else "so its step trains nothing."),
        "Make it after `softhooks.attach`, of `prompt.parameters()`.",
        optimizer=f"{type(optimizer).__name__} of {len(own)} parameters of {type(prompted.model).__name__}",
        prompt=", ".join(repr(prompt.name) for prompt in forgotten) + ", which has gradients",
    )
    if not trains:
        del _held_elsewhere[optimizer]  # say it at the next step too
        raise TrainerError(sentence)
    warnings.warn(sentence, UserWarning, stacklevel=stack_level())


def _is_held(prompt: AttachedPrompt, first: Optimizer) -> bool:
    """Whether an optimizer holds a parameter of a prompt that takes gradients: this one, or any other that is alive."""
    wanted = {id(parameter) for parameter in prompt.module.parameters() if parameter.grad is not None}
    if any(id(parameter) in wanted for parameter in _held(first)):
        return True
    others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer))
    return any(id(parameter) in wanted for other in others for parameter in _held(other))


def _has_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)
