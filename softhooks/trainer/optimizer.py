"""Make an optimizer hold exactly the trainable parameters of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from softhooks.backbone.heads import active_head
from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt

logger = logging.getLogger(__name__)

_FUSED = ("lomo", "adalomo", "_layerwise")
"""Endings of the names of optimizers that step inside the backward pass."""

_NAMES = "param_names"
"""The key for parameter names in a group of an optimizer that was created with named parameters."""


def name_of(args: TrainingArguments) -> str:
    """Return the name of the Trainer's optimizer, without "_fused", because a fused optimizer has the same state."""
    return str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")


def refuse_fused(name: str) -> None:
    """Refuse optimizers that step inside the backward pass."""
    if name.endswith(_FUSED):
        raise TrainerError(
            f"optim={name!r} steps inside the backward pass, so its state cannot be saved and the gradients cannot be checked.",
            "Choose another optimizer, such as 'adamw_torch'; the optimizer state of a prompt is small.",
        )


def is_mended(optimizer: Any, prompt: SoftPrompt) -> bool:
    """Whether an optimizer holds each trainable parameter of a prompt once, and nothing else."""
    held = sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return held == sorted(id(parameter) for parameter in prompt.parameters())


def mend_optimizer(optimizer: Any, prompt: SoftPrompt) -> None:
    """Remove frozen parameters from an optimizer and add the prompt's parameters.

    The prompt's copy of a head is added to the group of the model's head, and every other parameter to the first group. No group
    is added or removed, because schedulers have one learning rate per group.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    if not groups:
        raise TrainerError("the optimizer has no parameter group to add the prompt's parameters to.")
    names = {id(parameter): name for name, parameter in prompt.named_parameters()}
    missing = {id(parameter): parameter for parameter in prompt.parameters()}
    copies = _head_copies(prompt)
    state = getattr(optimizer, "optimizer", optimizer).state
    for group in groups:
        kept: list[nn.Parameter] = []
        for parameter in group["params"]:
            wanted = parameter if id(parameter) in names else copies.get(id(parameter))
            if wanted is not parameter:
                state.pop(parameter, None)
            if wanted is not None and missing.pop(id(wanted), None) is not None:
                kept.append(wanted)
        group["params"] = kept
    if missing:
        groups[0]["params"].extend(missing.values())
        _warn_about_learning_rate(groups, prompt)
    for group in groups:
        if _NAMES in group:
            group[_NAMES] = [names[id(parameter)] for parameter in group["params"]]


def _head_copies(prompt: SoftPrompt) -> dict[int, nn.Parameter]:
    """Map the id of each parameter of the model's heads to the prompt's copy of it."""
    copies: dict[int, nn.Parameter] = {}
    for key, own in prompt.heads.items():
        head = active_head(prompt.model.get_submodule(key.replace("/", ".")))
        copies |= {
            id(parameter): copied
            for parameter, copied in zip(head.parameters(), own.parameters(), strict=True)
            if copied.requires_grad
        }
    return copies


def _warn_about_learning_rate(groups: list[dict[str, Any]], prompt: SoftPrompt) -> None:
    rates = [group.get("lr") for group in groups]
    if any(rate != rates[0] for rate in rates):
        logger.warning(
            "the prompt %r is trained with lr=%s, the learning rate of the optimizer's first group",
            prompt.name,
            rates[0],
        )


def require_gradient(prompt: SoftPrompt, step: int) -> None:
    """Check before a step that the prompt has a gradient, because torch silently skips parameters without one."""
    if all(parameter.grad is None for parameter in prompt.encoder.parameters()):
        raise TrainerError(
            f"no gradient reached the prompt {prompt.name!r} in step {step + 1}.",
            "Look for weights that were quantized for inference only, a loss that does not use the model's output, or "
            "`torch.no_grad`.",
            prompt=repr(prompt),
        )


def drop_frozen(optimizer: Any) -> None:
    """Remove frozen parameters from an optimizer; keep its groups, because schedulers have one learning rate per group."""
    for group in optimizer.param_groups:
        kept = [number for number, parameter in enumerate(group["params"]) if parameter.requires_grad]
        for key in ("params", _NAMES):
            if key in group:
                group[key] = [group[key][number] for number in kept]


def held_by(optimizer: Any) -> set[int]:
    """Return the ids of the parameters that an optimizer holds."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def require_held(optimizers: Sequence[Any], prompt: SoftPrompt, remedy: str) -> str:
    """Check that optimizers hold all trainable parameters of a prompt; return the names of the optimizers that hold some."""
    names = {id(parameter): name for name, parameter in prompt.named_parameters()}
    held = [held_by(optimizer) for optimizer in optimizers]
    missing = [name for key, name in names.items() if not any(key in ids for ids in held)]
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if missing:
        raise TrainerError(
            f"the optimizers lack {len(missing)} of the {len(names)} trainable parameters of the prompt {prompt.name!r}.",
            remedy,
            missing=", ".join(missing[:8]),
            optimizers=", ".join(kinds) or "none",
        )
    return ", ".join(kind for kind, ids in zip(kinds, held, strict=True) if ids & set(names))
