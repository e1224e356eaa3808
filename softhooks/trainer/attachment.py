"""Attaching a callback's prompt to a model, or continuing with an equal prompt that the model already has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerControl

from softhooks.attach import attach
from softhooks.checks.choose_injection import choose_injection
from softhooks.method import Method
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
from softhooks.trainer.launch import injection_for_launch
from softhooks.trainer.log_metrics import LoggedMetrics
from softhooks.trainer.metrics import TrainingMetrics
from softhooks.trainer.prompt_checks import check_equal, require_trainable_prompt


def present_prompt(model: nn.Module, name: str) -> SoftPrompt | None:
    """Return the prompt of this name on a model, or None if there is none."""
    shared = prompted_model_of(model)
    return soft_prompts_of(shared).get(name) if shared else None


def attach_or_continue(
    model: nn.Module, method: Method, name: str, injection: Injection | None, options: dict[str, Any]
) -> tuple[SoftPrompt, bool]:
    """Attach a prompt, or return an equal prompt that the model already has.

    Args:
        options: more arguments of `attach`.

    Returns:
        the prompt, and whether it was attached now.

    Raises:
        NameTakenError: the model has another prompt of this name.
        TrainerError: the model's prompt has no parameters, or the launch does not allow this injection.
    """
    allowed = injection_for_launch(method, injection)
    present = present_prompt(model, name)
    if present is None:
        return attach(model, method, name, injection=allowed, **options), True
    check_equal(present, method, **options)
    require_trainable_prompt(present, may_be_frozen=True)
    if allowed is not None and present.injection != allowed:
        present.injection = choose_injection(present, allowed)
    return present, False


def saver_for(prompt: SoftPrompt, owner: object, control: TrainerControl, *, is_new: bool) -> CheckpointSaver:
    """Return the saver of a callback's prompt; if there is none, create it and start logging the prompt's metrics.

    Args:
        owner: the callback.
        control: the current control of the callback's Trainer; a Trainer that restores its callbacks' states replaces it.
        is_new: whether the callback has attached the prompt.
    """
    saver = saver_of(prompt.model)
    if saver is None or saver.prompt is not prompt or saver.owner is not owner:
        saver = CheckpointSaver(prompt, owner)
        saver.metrics, saver.attached_by_owner = TrainingMetrics(prompt), is_new
        prompt.prompted_model.outside_patches.keep(LoggedMetrics(saver))
    saver.control = control
    return saver
