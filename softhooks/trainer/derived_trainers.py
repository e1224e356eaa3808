"""Let integrations support libraries whose trainers subclass the transformers Trainer.

An integration registers a module for a library. The callback imports the module when a Trainer is created with the library's
subclass of `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from softhooks.method import Method
    from softhooks.runtime.prompted_model import PromptedModel


class TrainerIntegration(Protocol):
    """The functions that a registered module must define."""

    def check(self, args: TrainingArguments, model: nn.Module, method: Method, trainable: Sequence[str]) -> None:
        """Refuse settings that would train the prompt incorrectly; called before the prompt is attached.

        Raises:
            TrainerError: a setting is refused; the message names it.
        """

    def guard(self, args: TrainingArguments, prompted: PromptedModel) -> None:
        """Prepare the library's Trainer for a model with a prompt, until its last prompt is removed."""


_MODULES: dict[str, str] = {}


def register(package: str, module: str) -> None:
    """Register the module of an integration.

    Args:
        package: the library's top-level package, such as `trl`.
        module: the full name of a module with the functions of `TrainerIntegration`.
    """
    _MODULES[package] = module


def check_trainer(args: TrainingArguments, model: nn.Module, method: Method, trainable: Sequence[str]) -> None:
    """Call the `check` function of the library's integration, if one is registered."""
    integration = _integration_for(args)
    if integration is not None:
        integration.check(args, model, method, trainable)


def guard_trainer(args: TrainingArguments, prompted: PromptedModel) -> None:
    """Call the `guard` function of the library's integration, if one is registered."""
    integration = _integration_for(args)
    if integration is not None:
        integration.guard(args, prompted)


def _integration_for(args: TrainingArguments) -> TrainerIntegration | None:
    for kind in type(args).__mro__:
        module = _MODULES.get(kind.__module__.partition(".")[0])
        if module is not None:
            return cast("TrainerIntegration", import_module(module))
    return None
