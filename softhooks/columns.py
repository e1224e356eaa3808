"""Extra arguments of a model's forward: columns of the batch that prompts take and the model never sees.

The Trainer keeps the columns that `forward`'s signature names, and `generate` passes on the arguments that it names. So the
instance gets a `forward` whose signature names them; the host takes them out of each call before the model is reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from softhooks.errors import AttachError, UnsupportedModeError, explain


class SignedForward:
    """A model's own forward, under a signature that names more arguments.

    An object and not a closure, so that a deep copy of the model calls its own forward.

    Args:
        model: whose forward it is.
        names: the extra arguments.

    Raises:
        AttachError: the model has an argument of that name already.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = (*getattr(model.__dict__.get("forward"), "names", ()), *names)
        self.before: Callable[..., Any] | None = model.__dict__.get("forward")
        signature = inspect.signature(model.forward)
        parameters = list(signature.parameters.values())
        taken = [name for name in names if name in signature.parameters]
        if taken:
            raise AttachError(
                explain(
                    "a prompt's extra arguments must not be the model's own.",
                    "Use another method for this model.",
                    model=type(model).__name__,
                    both=", ".join(taken),
                )
            )
        rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        self.__signature__ = signature.replace(parameters=[*[p for p in parameters if p not in rest], *more, *rest])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def take(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Take the extra arguments out of a call's keyword arguments, in place.

    Raises:
        UnsupportedModeError: one of them is no tensor.
    """
    taken: dict[str, Tensor] = {}
    for name in names:
        value = kwargs.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise UnsupportedModeError(
                explain(
                    "an extra argument of the forward must be a tensor with one entry a row.",
                    "Let the collator make a tensor of it.",
                    argument=name,
                    found=type(value).__name__,
                )
            )
        taken[name] = value
    return taken


def require(given: dict[str, Tensor], name: str, why: str) -> Tensor:
    """An extra argument that a prompt cannot do without.

    Raises:
        UnsupportedModeError: the call did not bring it.
    """
    if name not in given:
        raise UnsupportedModeError(
            explain(
                f"this prompt needs the argument `{name}` in each call of the model.",
                f"Add a column `{name}` to the batch, or pass it to the model.",
                because=why,
                given=", ".join(given) or "no extra argument",
            )
        )
    return given[name]
