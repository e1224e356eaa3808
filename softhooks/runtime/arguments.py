"""Extra arguments of a model's forward: batch columns for prompts, which hooks remove before the model's own forward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from softhooks.errors import AttachError, UnsupportedModeError
from softhooks.layout.template import COLUMN
from softhooks.method import COLUMN_METHODS
from softhooks.patching.patches import MethodWrapper


def refuse_unused(call: dict[str, Any], used: Collection[str], known: Collection[str], own: Collection[str]) -> None:
    """Refuse a column that no active prompt uses; many models would ignore it silently.

    Args:
        call: the arguments of a call, by name.
        used: the columns that the active prompts use.
        known: the columns that any prompt of the model uses.
        own: the names of the model's own arguments.
    """
    for name in (*COLUMN_METHODS, *known):
        if call.get(name) is None or name in used or name in own:
            continue
        raise UnsupportedModeError(
            f"the call has the argument `{name}`, which no active prompt uses; it would be ignored.",
            f"Leave `{name}` out, or activate a prompt that uses it (`softhooks.activate`).",
            used_by=", ".join(COLUMN_METHODS.get(name, ["another prompt of this model"])),
            active_prompts_use=", ".join(f"`{column}`" for column in used) or "no column",
        )


class SignedForward(MethodWrapper):
    """A model's forward with extra arguments in its signature.

    If the signature lacked them, a Trainer would drop the columns from the batch, and `generate` would not pass them on.

    Args:
        model: the model.
        names: the extra arguments.
        accepted: a function that returns the extra arguments that the active prompts use.

    Raises:
        AttachError: the model's forward already has an argument of the same name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], accepted: Callable[[], Collection[str]]) -> None:
        super().__init__(model, "forward")
        self.accepted = accepted
        self.names = (*getattr(self.before, "names", ()), *names)
        signature = inspect.signature(model.forward)
        taken = [name for name in names if name in signature.parameters]
        if taken:
            raise AttachError(
                f"the forward of {type(model).__name__} already has an argument named {', '.join(taken)}; "
                "the prompt needs this name.",
                "Use another method for this model.",
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own arguments and the columns that the active prompts use."""
        signature = inspect.signature(self.original())
        parameters = [p for p in signature.parameters.values() if p.name not in self.names]
        more = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
            for n in self.names
            if n in self.accepted()
        ]
        # `**kwargs` comes last
        return signature.replace(parameters=sorted([*parameters, *more], key=lambda parameter: parameter.kind))


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
                "Convert the column to a tensor in the data collator."
                + (" A task is given by its number: its place in `tasks=`, from 0." if name == "task_ids" else ""),
            )
        taken[name] = value
    return taken


def choices_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return (B, C) for a multiple-choice input with C choices for each of B rows, and (0, 1) for any other input."""
    ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    for text, dimensions in ((ids, 3), (embeddings, 4)):
        if isinstance(text, Tensor) and text.dim() == dimensions:
            return text.shape[0], text.shape[1]
    return 0, 1


def for_each_choice(given: dict[str, Tensor], rows: int, choices: int) -> dict[str, Tensor]:
    """Repeat each row's extra arguments once per choice.

    If the column `soft_slots` already has one entry per choice, [B, C, S], it is flattened instead.
    """
    repeated = {}
    for name, value in given.items():
        if name == COLUMN and value.dim() == 3:
            repeated[name] = value.flatten(0, 1)
        elif value.dim() and value.shape[0] == rows:
            repeated[name] = value.repeat_interleave(choices, dim=0)
        else:
            repeated[name] = value  # the size is wrong: the method raises an error that names it
    return repeated
