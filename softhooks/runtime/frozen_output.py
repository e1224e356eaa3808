"""The output of a forward in which nothing takes a gradient: its loss explains why, if its `backward` is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.errors import TrainerError


class FrozenOutput(Tensor):
    """What a forward in which nothing takes a gradient returns: a loss, or logits and states that a loss is computed from.

    It is read as any other tensor; so is what is computed from it. A loss that also takes gradients from elsewhere goes backward.
    """

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, where torch would say that the tensor does not require grad.

        Raises:
            TrainerError: with what to do.
        """
        if not self.requires_grad:
            raise TrainerError(
                "a prompt that is to be trained must take gradients; everything in this forward is frozen.",
                "Load the prompt with `softhooks.load(model, path, trainable=True)`, before the optimizer is made.",
                loss="made of frozen parameters only",
            )
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, format_spec: str) -> str:
        """Format as a plain tensor: torch gives only those `f"{loss:.2f}"`."""
        return format(self.as_subclass(Tensor), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Print as a plain tensor."""
        return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def tell_frozen(output: Any) -> Any:
    """Let a loss that is in a model's output, or is computed from it, say what is missing, should it go backward."""
    if type(output) is tuple:
        return tuple(map(_told, output))
    if isinstance(output, dict):
        for name, value in output.items():
            if (told := _told(value)) is not value:
                output[name] = told
        return output
    return _told(output)


def _told(value: Any) -> Any:
    plain = type(value) is Tensor and value.is_floating_point() and not value.requires_grad and not value.is_inference()
    return value.as_subclass(FrozenOutput) if plain else value
