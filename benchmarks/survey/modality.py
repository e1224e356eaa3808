"""A modality: which models there are, what a batch looks like, and which checks apply. One file of `modalities/` each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import softhooks
from benchmarks.survey.case import Case
from softhooks.method import Method

Output = Literal["tokens", "decoder", "pooled"]


@dataclass(frozen=True)
class Task:
    """One of transformers' Auto classes.

    Attributes:
        title: its name in the report.
        auto_class: the class, such as `AutoModelForCausalLM`.
        mapping: the name of the mapping in `transformers.models.auto.modeling_auto`.
        output: whether there is an output for each of the input's tokens, for those of a decoder, or one for each row.
    """

    name: str
    title: str
    auto_class: str
    mapping: str
    output: Output

    @property
    def architectures(self) -> list[str]:
        """The `model_type` of every architecture that transformers has for the task."""
        return list(getattr(modeling_auto, self.mapping))


class Example(Protocol):
    """A batch. Checks that need more than `call`, such as those of padding, apply to `Text` only."""

    def call(self) -> dict[str, Any]:
        """The arguments of a forward."""


@dataclass(frozen=True)
class Modality:
    """The base class of modalities; the file of a modality ends with an instance.

    Attributes:
        tasks: the tasks.
        checks: the names of the checks that apply, in order.
        kinds: the names of the kinds of prompts to try.
    """

    tasks: Sequence[Task]
    checks: Sequence[str]
    kinds: Sequence[str]

    def build(self, case: Case) -> nn.Module:
        """Make the tiny model of a case, in evaluation mode, with weights large enough that every part of it matters."""
        raise NotImplementedError

    def example(self, model: nn.Module, case: Case) -> Any:
        """Make a batch for a model."""
        raise NotImplementedError

    def attach(self, model: nn.Module, method: Method, example: Any) -> softhooks.SoftPrompt:
        """Attach a prompt as a user would."""
        return softhooks.attach(model, method)


def output_of(output: Any) -> Tensor:
    """The tensor that a model is used for."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    for name in ("logits", "logits_per_image", "predicted_depth", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output[0]


def answer(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The output of a forward without gradients, in single precision."""
    with torch.no_grad():
        return output_of(model(**call)).float()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected; infinite if the shapes differ, or on NaN."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return float("inf") if math.isnan(difference) else difference


def without_dropout(model: nn.Module) -> None:
    """Set every rate of dropout to 0, so that a forward in training mode computes the same as one in evaluation mode."""
    for module in model.modules():
        for name, value in vars(module).copy().items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                setattr(module, name, 0.0)
    for config in {id(c): c for c in _configs(model)}.values():
        for name, value in vars(config).copy().items():
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)


def _configs(model: nn.Module) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
