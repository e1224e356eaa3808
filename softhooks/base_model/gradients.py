"""Remove gradients of frozen parameters, because an optimizer over all parameters would apply them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class StashedGradients:
    """Gradients that parameters had before they were frozen. Copies and pickles of this object are empty."""

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def take(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Move the gradients of these parameters into this object."""
        for name, parameter in parameters:
            if parameter.grad is not None:
                self._gradients[name] = parameter.grad
                parameter.grad = None

    def restore(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Restore the gradients, except for parameters that have a new gradient or shape.

        If a parameter's device or dtype has changed, its gradient is converted.
        """
        for name, parameter in parameters:
            gradient = self._gradients.pop(name, None)
            if gradient is None or parameter.grad is not None or gradient.shape != parameter.shape:
                continue
            is_same = (gradient.device, gradient.dtype) == (parameter.device, parameter.dtype)
            parameter.grad = gradient if is_same else gradient.to(parameter)
        self._gradients.clear()
