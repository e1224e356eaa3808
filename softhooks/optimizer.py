"""Make an optimizer that somebody else built hold exactly what is trained."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from softhooks.errors import TrainerError
from softhooks.heads import worn
from softhooks.prompt import SoftPrompt

logger = logging.getLogger(__name__)

_NAMES = "param_names"
"""Where a group keeps its parameters' names, if the optimizer was given them."""


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
