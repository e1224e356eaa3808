"""Losses that cannot train the prompt: their value can be read, but `backward` raises an error that names the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from softhooks.errors import TrainerError
from softhooks.method import Method


class FrozenOutput(Tensor):
    """An output of a forward without trainable parameters: a loss, logits or hidden states.

    Tensors computed from it are of this class too. `backward` works if they also depend on trainable parameters.
    """

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Compute gradients.

        Raises:
            TrainerError: the loss does not require grad; torch's own error would not name the cause.
        """
        if not self.requires_grad:
            raise TrainerError(
                "`backward` was called on a loss without trainable parameters; the prompt was loaded without `trainable=True`.",
                "Load the prompt with `softhooks.load(model, path, trainable=True)`, before you make the optimizer.",
            )
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, format_spec: str) -> str:
        """Format as a plain tensor, because `f"{loss:.2f}"` works only for plain tensors."""
        return format(self.as_subclass(Tensor), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Print as a plain tensor."""
        return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def mark_frozen(output: Any) -> Any:
    """Convert the tensors of a model's output to `FrozenOutput`."""
    if type(output) is tuple:
        return tuple(map(_marked, output))
    if isinstance(output, dict):
        for name, value in output.items():
            if (marked := _marked(value)) is not value:
                output[name] = marked
        return output
    return _marked(output)


def _marked(value: Any) -> Any:
    plain = type(value) is Tensor and value.is_floating_point() and not value.requires_grad and not value.is_inference()
    return value.as_subclass(FrozenOutput) if plain else value


def refuse_evaluation(method: Method, model: nn.Module) -> None:
    """Refuse to train a model in evaluation mode if the method has an objective."""
    if not model.training and method.objective() is not None:
        raise _in_evaluation(method, model)


def refuse_backward(method: Method, model: nn.Module) -> Callable[[Any], Any]:
    """Return a function that makes the `backward` of a loss raise a TrainerError, because the model is in evaluation mode."""

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
        "Call `model.train()` first; `from_pretrained` returns models in evaluation mode.",
    )
