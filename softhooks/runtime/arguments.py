"""Extra arguments of a model's forward: columns of the batch that prompts take and the model never sees.

The Trainer keeps the columns that `forward`'s signature names, and `generate` passes on the arguments that it names. So the
instance gets a `forward` whose signature names them; a hook takes them out of each call before the model is reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from softhooks.errors import AttachError, UnsupportedModeError

TAKEN_BY = {
    "task_ids": "MultitaskPromptTuning",
    "example_ids": "ContextTuning, and ContextAwarePromptTuning with `leave_one_out`",
    "prompt_context": "LlamaAdapter",
    "soft_slots": "PTuning with a template as its layout",
}
"""The columns of the methods of this library, and which methods take them."""


def refuse_unused(call: dict[str, Any], used: Collection[str], known: Collection[str], own: Collection[str]) -> None:
    """Refuse a column for prompts that none of the prompts in use takes: models swallow what they do not know.

    Args:
        call: the arguments of a call, by name.
        used: the columns that the prompts in use take.
        known: those of all prompts of the model.
        own: the names of the arguments that the model itself takes.

    Raises:
        UnsupportedModeError: naming the column and the methods that take it.
    """
    for name in (*TAKEN_BY, *known):
        if call.get(name) is None or name in used or name in own:
            continue
        raise UnsupportedModeError(
            "a column for prompts needs a prompt in use that takes it; it would be ignored.",
            f"Leave `{name}` out, or use a prompt that takes it (`softhooks.activate`).",
            column=f"`{name}`",
            taken_by=TAKEN_BY.get(name, "another prompt of this model"),
            prompts_in_use=f"take {', '.join(f'`{column}`' for column in used) or 'no column'}",
        )


class SignedForward:
    """A model's own forward, under a signature that names more arguments.

    An object and not a closure, so that a deep copy of the model calls its own forward.

    Args:
        model: whose forward it is.
        names: the extra arguments.
        accepted: tells those that a call may bring now; None: all.

    Raises:
        AttachError: the model has an argument of that name already.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], accepted: Callable[[], Collection[str]] | None = None
    ) -> None:
        self.model = model
        self.accepted = accepted
        self.names = (*getattr(model.__dict__.get("forward"), "names", ()), *names)
        self.before: Callable[..., Any] | None = model.__dict__.get("forward")
        signature = inspect.signature(model.forward)
        taken = [name for name in names if name in signature.parameters]
        if taken:
            raise AttachError(
                "a prompt's extra arguments must not be the model's own.",
                "Use another method for this model.",
                model=type(model).__name__,
                both=", ".join(taken),
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own arguments and the columns that a call may bring now; the Trainer leaves all others out."""
        signature = inspect.signature(self._own())
        parameters = [p for p in signature.parameters.values() if p.name not in self.names]
        rest = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        names = self.names if self.accepted is None else [name for name in self.names if name in self.accepted()]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        return signature.replace(parameters=[*[p for p in parameters if p not in rest], *more, *rest])

    def _own(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before
        own: Callable[..., Any] = type(self.model).forward.__get__(self.model)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward; not `_own`, for `torch.compile` would take a bound method for this object."""
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
                "an extra argument of the forward must be a tensor with one entry a row.",
                "Let the collator make a tensor of it.",
                argument=name,
                found=type(value).__name__,
            )
        taken[name] = value
    return taken
