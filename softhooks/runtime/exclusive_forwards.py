"""The forwards during which no other thread may run the model, because they change it while they run."""

from __future__ import annotations

import torch

from softhooks.runtime.prompted_model import PromptedModel


def needs_model_alone(prompted: PromptedModel) -> bool:
    """Whether a forward that begins now would change the model while it runs.

    Some models store state in their modules. A training forward changes the mode of the modules if dropout is disabled, or if
    there is an objective, which may have a teacher.
    """
    if prompted.structure.changes_modules:
        return True
    stacks = prompted.structure.stacks
    if not (prompted.model.training or stacks[0].module.training or stacks[-1].module.training):
        return False
    if not prompted.is_in_use:
        return False
    if prompted.freeze_dropout:
        return True
    return torch.is_grad_enabled() and any(
        prompt.objective is not None and prompt.takes_gradients for prompt in prompted.active_prompts()
    )


def generation_needs_model_alone(prompted: PromptedModel) -> bool:
    """The same for `generate`, which computes no gradients, so that no objective runs."""
    with torch.no_grad():
        return needs_model_alone(prompted)
