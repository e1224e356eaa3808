"""Make an optimizer that somebody else built hold exactly what is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from softhooks.backbone.heads import worn
from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt

logger = logging.getLogger(__name__)

_FUSED = ("lomo", "adalomo", "_layerwise")
"""How the names end of optimizers that step inside the backward."""

_NAMES = "param_names"
"""Where a group keeps its parameters' names, if the optimizer was given them."""


def name_of(args: TrainingArguments) -> str:
    """What a Trainer's own optimizer is called; a fused one keeps the state of the plain one."""
    return str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")


def refuse_fused(name: str) -> None:
    """Refuse the optimizers that train inside the backward: they hold no parameters, and a checkpoint gets no state of theirs.

    Raises:
        TrainerError: naming the option.
    """
    if name.endswith(_FUSED):
        raise TrainerError(
            "an optimizer must hold the prompt's parameters and their state; one that steps inside the backward does not.",
            "Choose another, such as 'adamw_torch': a prompt's optimizer state is small anyway.",
            optim=repr(name),
        )


def is_mended(optimizer: Any, prompt: SoftPrompt) -> bool:
    """Whether an optimizer holds the trainable parameters of a prompt, each once, and nothing else."""
    held = sorted(id(parameter) for group in _groups(optimizer) for parameter in group["params"])
    return held == sorted(id(parameter) for parameter in prompt.parameters())


def mend_optimizer(optimizer: Any, prompt: SoftPrompt) -> None:
    """Take frozen parameters out of an optimizer and put the prompt's in.

    Groups stay in number and order, with their options, for schedulers count them. The prompt's own copy of a head goes into the
    group that holds the model's head, everything else into the first group.

    Raises:
        TrainerError: the optimizer has no group.
    """
    groups = _groups(optimizer)
    if not groups:
        raise TrainerError("an optimizer must have a parameter group to put the prompt into; it has none.")
    names = {id(parameter): name for name, parameter in prompt.named_parameters()}
    missing = {id(parameter): parameter for parameter in prompt.parameters()}
    copies = _copies(prompt)
    state = getattr(optimizer, "optimizer", optimizer).state
    for group in groups:
        kept = []
        for parameter in group["params"]:
            wanted = parameter if id(parameter) in names else copies.get(id(parameter))
            if wanted is not parameter:
                state.pop(parameter, None)
            if wanted is not None and missing.pop(id(wanted), None) is not None:
                kept.append(wanted)
        group["params"] = kept
    if missing:
        groups[0]["params"].extend(missing.values())
        _say_rate(groups, prompt)
    for group in groups:
        if _NAMES in group:
            group[_NAMES] = [names[id(parameter)] for parameter in group["params"]]


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


def _copies(prompt: SoftPrompt) -> dict[int, nn.Parameter]:
    """Which of the prompt's own parameters stands for which of the model's heads', by identity."""
    copies: dict[int, nn.Parameter] = {}
    for key, own in prompt.heads.items():
        head = worn(prompt.model.get_submodule(key.replace("/", ".")))
        copies |= {
            id(parameter): copied
            for parameter, copied in zip(head.parameters(), own.parameters(), strict=True)
            if copied.requires_grad
        }
    return copies


def _say_rate(groups: list[dict[str, Any]], prompt: SoftPrompt) -> None:
    rates = [group.get("lr") for group in groups]
    if any(rate != rates[0] for rate in rates):
        logger.warning("the prompt %r trains at lr=%s, that of the optimizer's first group", prompt.name, rates[0])


def require_gradient(prompt: SoftPrompt, step: int) -> None:
    """Refuse a step where no gradient has reached the prompt: nothing would train, and nothing would tell.

    Raises:
        TrainerError: naming the step.
    """
    if all(parameter.grad is None for parameter in prompt.encoder.parameters()):
        raise TrainerError(
            "the loss must reach the prompt with a gradient.",
            "Look for weights that pass none on (quantized for inference), a loss computed without the model's output, or "
            "`torch.no_grad`.",
            prompt=repr(prompt),
            step=step + 1,
        )


def drop_frozen(optimizer: Any) -> None:
    """Take what does not train out of an optimizer; groups stay, for schedulers count them."""
    for group in _groups(optimizer):
        kept = [number for number, parameter in enumerate(group["params"]) if parameter.requires_grad]
        for key in ("params", _NAMES):
            if key in group:
                group[key] = [group[key][number] for number in kept]


def held_by(optimizer: Any) -> set[int]:
    """The parameters that an optimizer holds, by identity."""
    return {id(parameter) for group in _groups(optimizer) for parameter in group["params"]}


def require_held(optimizers: Sequence[Any], prompt: SoftPrompt, remedy: str) -> str:
    """Name the optimizers that hold a prompt.

    Args:
        remedy: what to do if they do not.

    Raises:
        TrainerError: something that trains is in none of them.
    """
    names = {id(parameter): name for name, parameter in prompt.named_parameters()}
    held = [held_by(optimizer) for optimizer in optimizers]
    missing = [name for key, name in names.items() if not any(key in ids for ids in held)]
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if missing:
        raise TrainerError(
            "a loop's optimizers must hold all that the prompt trains.",
            remedy,
            missing=", ".join(missing[:8]),
            optimizers=", ".join(kinds) or "none",
        )
    return ", ".join(kind for kind, ids in zip(kinds, held, strict=True) if ids & set(names))
