"""Trainers that other frameworks have made of the Trainer, known by the package of their arguments: what a prompt needs there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments

from softhooks.method import Method

if TYPE_CHECKING:
    from softhooks.runtime.prompted_model import PromptedModel

_MINDED = {"trl": "softhooks.integrations.trl"}
"""For each package, the module whose `check(args, model, method, trainable)` and `guard(args, prompted)` mind its trainers."""


def check_framework(args: TrainingArguments, model: nn.Module, method: Method, trainable: Sequence[str]) -> None:
    """Refuse, before anything is attached, what a framework's trainer would do wrongly without a word.

    Raises:
        TrainerError: naming the setting.
    """
    minding = _minding(args)
    if minding is not None:
        minding.check(args, model, method, trainable)


def guard_framework(args: TrainingArguments, prompted: PromptedModel) -> None:
    """Stay beside a framework's trainer for as long as its model carries a prompt."""
    minding = _minding(args)
    if minding is not None:
        minding.guard(args, prompted)


def _minding(args: TrainingArguments) -> Any:
    for kind in type(args).__mro__:
        name = _MINDED.get(kind.__module__.partition(".")[0])
        if name is not None:
            return import_module(name)
    return None
