"""Refuse to train in evaluation mode, in which a method's objective would not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from softhooks.errors import TrainerError
from softhooks.method import Method


def refuse_evaluation(method: Method, model: nn.Module) -> None:
    """Refuse to train a model in evaluation mode if the method has an objective.

    Raises:
        TrainerError: it is in evaluation mode.
    """
    if not model.training and method.objective() is not None:
        raise _in_evaluation(method, model)


def refuse_backward(method: Method, model: nn.Module) -> Callable[[Any], Any]:
    """Return a function that lets the loss of a forward in evaluation mode be read, but not go backward.

    Its `backward` raises TrainerError, naming the method.
    """

    def refuse(_gradient: Tensor) -> None:
        raise _in_evaluation(method, model)

    def finish(output: Any) -> Any:
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
            loss.register_hook(refuse)
        return output

    return finish


def _in_evaluation(method: Method, model: nn.Module) -> TrainerError:
    return TrainerError(
        f"{type(model).__name__} is in evaluation mode, in which the objective of {method.kind} does not run.",
        "Call `model.train()` first: `from_pretrained` gives a model in evaluation mode, and some loops leave it there.",
    )
