"""The interface of training objectives, and the attributes of a prompt that they use."""

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
"""A function that replaces the model's output."""


class PromptOnModel(Protocol):
    """The attributes of an attached prompt that objectives and methods use."""

    @property
    def name(self) -> str:
        """The prompt's name."""

    @property
    def model(self) -> nn.Module:
        """The model that the user passed."""

    @property
    def structure(self) -> ModelStructure:
        """The model's embedding and attention layers."""

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""

    @property
    def injection(self) -> str:
        """How the prompt enters the model; see `SoftPrompt`."""

    @property
    def conventions(self) -> Mapping[str, Any]:
        """The assumptions about the forward pass that are saved with the prompt; see `Method.conventions`."""

    @property
    def placeholder_id(self) -> int:
        """An ordinary token id, for forward passes in which only the number of ids matters."""

    @property
    def states(self) -> Tensor | None:
        """The virtual tokens' last hidden states; None unless this forward runs the prompt through the model before the text."""

    def without_objective(self) -> AbstractContextManager[Any]:
        """Return a context manager that disables this prompt's objective."""

    def with_key_values(self, key_values: Callable[[Stack], dict[Role, KeyValues]]) -> AbstractContextManager[None]:
        """Return a context manager that replaces the prompt's keys and values; the new ones may have a different length."""


class Objective(ABC):
    """A training loss that is added to the model's own loss or replaces it.

    The objective puts this loss into the model's output, so a Trainer and any loop that reads `output.loss` work unchanged.
    """

    def check(self, prompt: PromptOnModel) -> None:  # noqa: B027 - most objectives suit every model
        """Raise an error if this objective cannot train the model; called when a prompt is attached for training."""

    @abstractmethod
    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Prepare a training forward.

        Args:
            prompt: the prompt that is being trained.
            call: the arguments of the model's forward by name, including `labels`; may be changed in place.
            given: the method's batch columns, by name.

        Returns:
            a function that computes the loss and puts it into the output, or None to leave the output unchanged.
        """


def with_loss(output: Any, loss: Tensor, has_loss: bool) -> Any:
    """Put a loss into a model's output (a `ModelOutput` or a tuple); with `has_loss`, replace the loss that is already there."""
    if isinstance(output, tuple):
        return (loss, *output[1:]) if has_loss else (loss, *output)
    output["loss"] = loss
    if not has_loss:
        output.move_to_end("loss", last=False)  # callers also index outputs by position, where the loss comes first
    return output
