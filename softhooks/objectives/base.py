"""The interface of training objectives, and the attributes of a prompt that they use.

An objective adds to, or replaces, the model's own loss in each training forward that has labels. It may change the call before
the model runs, and the output afterwards, so a Trainer and any loop that reads `output.loss` work without a change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from softhooks.backbone.stack import ModelStructure, Role, Stack
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.prompt_encoder import PromptEncoder

Finish = Callable[[Any], Any]
"""A function that takes the model's output and returns the output to use instead."""


class PromptOnModel(Protocol):
    """The attributes of an attached prompt that objectives and methods use."""

    @property
    def name(self) -> str:
        """The name of the prompt on the model."""

    @property
    def model(self) -> nn.Module:
        """The model, as the user gave it."""

    @property
    def structure(self) -> ModelStructure:
        """The model's stacks, embeddings and attention layers."""

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""

    @property
    def injection(self) -> str:
        """How the prompt enters the model; see `SoftPrompt`."""

    @property
    def conventions(self) -> Mapping[str, Any]:
        """The assumptions of the prompt about the forward pass: shifted positions, sliding windows, placement."""

    @property
    def placeholder_id(self) -> int:
        """An ordinary id of the vocabulary, for calls in which only the number of ids matters."""

    @property
    def states(self) -> Tensor | None:
        """The virtual tokens' last hidden states in this forward, [R, P, H]; None if the prompt was not run before the text."""

    def without_objective(self) -> AbstractContextManager[Any]:
        """Inside the context, run the model without this prompt's objective."""

    def with_key_values(self, key_values: Callable[[Stack], dict[Role, KeyValues]]) -> AbstractContextManager[None]:
        """Inside the context, use other keys and values, of any length, instead of the prompt's."""


class Objective(ABC):
    """A training objective. `Method.objective` returns one, or None to train on the model's own loss."""

    def check(self, prompt: PromptOnModel) -> None:  # noqa: B027 - most objectives suit every model
        """Refuse a model that this objective cannot train; called when a prompt is attached for training."""

    @abstractmethod
    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Prepare one training forward, before the model runs.

        Args:
            prompt: the prompt that is trained.
            call: the arguments of the model's forward by name, including `labels`; may be changed in place.
            given: the batch columns that the method takes.

        Returns:
            a function that computes the loss and puts it into the output; None leaves the output unchanged.
        """


def with_loss(output: Any, loss: Tensor, has_loss: bool) -> Any:
    """Return a model's output with this loss.

    Args:
        output: a `ModelOutput` or a tuple.
        loss: the loss, a scalar.
        has_loss: whether the output already has a loss, which is replaced.
    """
    if isinstance(output, tuple):
        return (loss, *output[1:]) if has_loss else (loss, *output)
    output["loss"] = loss
    if not has_loss:
        output.move_to_end("loss", last=False)  # callers also index outputs by position, where the loss comes first
    return output
