"""Extra arguments of a model's forward: batch columns that prompts take and the model itself does not receive.

The Trainer keeps the columns that `forward`'s signature names, and `generate` passes on the arguments that it names. So the
instance gets a `forward` that has the extra arguments in its signature; a hook removes them from each call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from softhooks.errors import AttachError, UnsupportedModeError
from softhooks.method import COLUMN_METHODS
from softhooks.patching.method_wrapper import MethodWrapper


def refuse_unused(call: dict[str, Any], used: Collection[str], known: Collection[str], own: Collection[str]) -> None:
    """Refuse a column that no prompt in use takes; many models would ignore it silently.

    Args:
        call: the arguments of a call, by name.
        used: the columns of the prompts in use.
        known: the columns of all prompts of the model.
        own: the names of the model's own arguments.

    Raises:
        UnsupportedModeError: a column is not used; the error names it and the methods that take it.
    """
    for name in (*COLUMN_METHODS, *known):
        if call.get(name) is None or name in used or name in own:
            continue
        raise UnsupportedModeError(
            f"the call has the argument `{name}`, which no prompt in use takes; it would be ignored.",
            f"Leave `{name}` out, or use a prompt that takes it (`softhooks.activate`).",
            taken_by=", ".join(COLUMN_METHODS.get(name, ["another prompt of this model"])),
            prompts_in_use_take=", ".join(f"`{column}`" for column in used) or "no column",
        )


class SignedForward(MethodWrapper):
    """A model's forward with extra arguments in its signature.

    Args:
        model: the model.
        names: the extra arguments.
        accepted: returns the extra arguments that a call may have now, or None for all.

    Raises:
        AttachError: the model's forward already has an argument of this name.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], accepted: Callable[[], Collection[str]] | None = None
    ) -> None:
        super().__init__(model, "forward")
        self.accepted = accepted
        self.names = (*getattr(self.before, "names", ()), *names)
        signature = inspect.signature(model.forward)
        taken = [name for name in names if name in signature.parameters]
        if taken:
            raise AttachError(
                f"the forward of {type(model).__name__} already has an argument {', '.join(taken)}, which the prompt takes too.",
                "Use another method for this model.",
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own arguments and the columns that a call may have now. The Trainer drops all other columns."""
        signature = inspect.signature(self.original())
        parameters = [p for p in signature.parameters.values() if p.name not in self.names]
        rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        names = self.names if self.accepted is None else [name for name in self.names if name in self.accepted()]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        return signature.replace(parameters=[*[p for p in parameters if p not in rest], *more, *rest])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward, but not with `original()`: `torch.compile` would confuse a bound method with this object."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


def take(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Remove the extra arguments from a call's keyword arguments in place, and return them.

    Raises:
        UnsupportedModeError: an extra argument is not a tensor.
    """
    taken: dict[str, Tensor] = {}
    for name in names:
        value = kwargs.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise UnsupportedModeError(
                f"`{name}` is a {type(value).__name__}; it must be a tensor with one entry for each row.",
                "Convert the column to a tensor in the data collator.",
            )
        taken[name] = value
    return taken
