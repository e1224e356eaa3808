"""The output of a forward in which everything is frozen. Its loss can be read; its `backward` says why there is no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.errors import TrainerError


class FrozenOutput(Tensor):
    """A tensor of the output of a forward in which everything is frozen: a loss, or logits and states.

    Tensors computed from it have this class too. A loss that also depends on trainable parameters elsewhere has a backward.
    """

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, if anything takes one.

        Raises:
            TrainerError: nothing does; torch would say that the tensor does not require grad.
        """
        if not self.requires_grad:
            raise TrainerError(
                "`backward` on a loss of frozen parameters only; the prompt was loaded without `trainable=True`.",
                "Load the prompt with `softhooks.load(model, path, trainable=True)`, before the optimizer is made.",
            )
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, format_spec: str) -> str:
        """Format as a plain tensor: torch supports `f"{loss:.2f}"` only for those."""
        return format(self.as_subclass(Tensor), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Print as a plain tensor."""
        return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def mark_frozen(output: Any) -> Any:
    """Make the tensors of a model's output `FrozenOutput`s, so that a loss in it, or computed from it, has a clear error."""
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
