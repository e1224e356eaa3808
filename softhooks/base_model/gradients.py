"""Remove the gradients that frozen parameters already have, because an optimizer over all parameters would apply them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class StashedGradients:
    """The gradients removed from parameters that are now frozen, by name. Copies and pickles are empty."""

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as an empty object."""
        return type(self), ()

    def take(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Remove and keep the gradients of these parameters."""
        for name, parameter in parameters:
            if parameter.grad is not None:
                self._gradients[name] = parameter.grad
                parameter.grad = None

    def restore(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Restore the gradients, converted to the parameter's device and dtype if these have changed.

        A parameter that has a new gradient keeps it. If the shape of a parameter has changed, its gradient is not restored.
        """
        for name, parameter in parameters:
            gradient = self._gradients.pop(name, None)
            if gradient is None or parameter.grad is not None or gradient.shape != parameter.shape:
                continue
            is_same = (gradient.device, gradient.dtype) == (parameter.device, parameter.dtype)
            parameter.grad = gradient if is_same else gradient.to(parameter)
        self._gradients.clear()
