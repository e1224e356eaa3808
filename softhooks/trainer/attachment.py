"""Attach a callback's prompt to a model, and freeze the model's other prompts during training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerControl

from softhooks.attach import attach
from softhooks.base_model.gradients import StashedGradients
from softhooks.checks.choose_injection import choose_injection
from softhooks.errors import UnsupportedModelError
from softhooks.method import Method
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
from softhooks.trainer.launch import injection_for_launch
from softhooks.trainer.metrics import TrainingMetrics
from softhooks.trainer.prompt_checks import TrainingCallback, check_equal, require_trainable_prompt
from softhooks.trainer.trainer_patches import LoggedMetrics
from softhooks.trainer.training_batch import training_batch


def present_prompt(model: nn.Module, name: str) -> SoftPrompt | None:
    """Return the model's prompt with this name, or None if it has none."""
    shared = prompted_model_of(model)
    return soft_prompts_of(shared).get(name) if shared else None


def attach_or_continue(
    model: nn.Module,
    method: Method,
    name: str,
    injection: Injection | None,
    options: dict[str, Any],
    callback: TrainingCallback | None = None,
) -> tuple[SoftPrompt, bool]:
    """Attach a prompt, or find the same prompt on the model. Return the prompt, and whether it is new.

    Args:
        options: further arguments of `attach`.
        callback: the callback that trains the prompt, if its Trainer is calling it. A model that does not run on token ids alone
            gets an example from the Trainer's training rows.
    """
    allowed = injection_for_launch(method, injection)
    present = present_prompt(model, name)
    if present is None:
        return _attach(model, method, name, {**options, "injection": allowed}, callback), True
    check_equal(present, method, **options)
    require_trainable_prompt(present, may_be_frozen=True)
    if allowed is not None and present.injection != allowed:
        present.injection = choose_injection(present, allowed)
    return present, False


def _attach(
    model: nn.Module,
    method: Method,
    name: str,
    options: dict[str, Any],
    callback: TrainingCallback | None,
) -> SoftPrompt:
    """Attach a prompt; if the model is not supported without an example, try again with one of the Trainer's training rows."""
    try:
        return attach(model, method, name, **options)
    except UnsupportedModelError:
        example = None if callback is None or options.get("example") is not None else training_batch(callback, method)
        if example is None:
            raise
    return attach(model, method, name, **{**options, "example": example})


def saver_for(prompt: SoftPrompt, owner: object, control: TrainerControl, *, is_new: bool) -> CheckpointSaver:
    """Return the `CheckpointSaver` of a callback's prompt. If there is none, create one and start logging the prompt's metrics.

    Args:
        is_new: whether the callback attached the prompt.
    """
    saver = saver_of(prompt.model)
    if saver is None or saver.prompt is not prompt or saver.owner is not owner:
        saver = CheckpointSaver(prompt, owner)
        saver.metrics, saver.attached_by_owner = TrainingMetrics(prompt), is_new
        prompt.prompted_model.outside_patches.keep(LoggedMetrics(saver))
    saver.control = control  # the Trainer may replace its control when it restores the states of callbacks
    return saver


class FrozenPrompts:
    """Freezes a model's other prompts while one prompt trains."""

    def __init__(self) -> None:
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._gradients = StashedGradients()

    def freeze_all_but(self, prompt: SoftPrompt) -> None:
        """Make one prompt trainable and freeze the others; `unfreeze` restores their gradients."""
        for other in prompt.prompted_model.prompts.values():
            for part in (other.encoder, other.heads):
                for name, parameter in part.named_parameters(f"{other.name}.{type(part).__name__}"):
                    if other is not prompt and parameter.requires_grad:
                        self._frozen.append((name, parameter))
                    parameter.requires_grad_(other is prompt)
        self._gradients.take(self._frozen)

    def unfreeze(self) -> None:
        """Make the other prompts trainable again, and restore their gradients."""
        for _, parameter in self._frozen:
            parameter.requires_grad_(True)
        self._gradients.restore(self._frozen)
        self._frozen.clear()
