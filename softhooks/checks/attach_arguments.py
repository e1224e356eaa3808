"""Checks of the arguments of `attach`, before anything in the model is changed."""

from __future__ import annotations

import fnmatch
import re

from torch import nn

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.sharding import refuse_partitioned
from softhooks.errors import AttachError, NameTakenError, PromptTooLongError, UnsupportedMethodError
from softhooks.method import Method
from softhooks.runtime.prompted_model import PromptedModel

_LEAST_TEXT = 5
"""The number of text tokens in the first probe of a prompt."""


def check_arguments(
    model: nn.Module, method: Method, name: str, present: PromptedModel | None, trainable: tuple[str, ...]
) -> None:
    """Check the arguments of `attach` against the model and the prompts that it has.

    Args:
        present: of the model, if it carries any.

    Raises:
        AttachError: nothing of the kind can be attached.
    """
    if not isinstance(method, Method):
        raise UnsupportedMethodError(
            f"attach takes a method such as PromptTuning(20); it was given {type(method).__name__}."
        )
    if (
        not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        or hasattr(nn.ModuleDict, name)
        or name in ("training", "prompted_model")
    ):
        raise AttachError(f"a prompt's name must be letters, digits, - and _, and no module attribute; it is {name!r}.")
    refuse_partitioned(model)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise AttachError("attach a prompt before `torch.compile`: compiled code does not see hooks that come later.")
    if present and name in present.prompts:
        raise NameTakenError(
            f"a prompt named {name!r} is attached already; a name belongs to one prompt.",
            "Remove the other prompt first, or attach this one under another `name=`.",
            attached=f"{name!r}: {present.prompts[name].method!r}",
            asked=f"{name!r}: {method!r}",
        )
    if present is None and hasattr(model, CONTAINER):
        raise AttachError(f"the model has an attribute {CONTAINER!r} of its own; softhooks needs that name.")
    names = [parameter for parameter, _ in model.named_parameters()]
    for pattern in trainable:
        if not fnmatch.filter(names, pattern):
            raise AttachError(f"trainable={pattern!r} names no parameter of {type(model).__name__}.")


def check_length(structure: ModelStructure, method: Method) -> None:
    """Check that a prompt leaves positions for text.

    Raises:
        PromptTooLongError: it does not.
    """
    positions = structure.entry.positions
    trained = positions.trained if positions.rotary_limit is None else positions.rotary_limit
    limit = positions.limit if positions.limit is not None else trained
    length = method.token_layout.num_slots
    if method.enters != "branch" and limit is not None and length >= limit:
        raise too_long_error(length, limit, _LEAST_TEXT)


def too_long_error(length: int, limit: int, text: int) -> PromptTooLongError:
    """The error for a prompt that leaves too few positions for text.

    Args:
        length: the number of virtual tokens.
        limit: the number of positions.
        text: how many tokens of text must fit after them.
    """
    most = max(limit - text, 0)
    return PromptTooLongError(
        f"{length} virtual tokens do not leave room for text among the model's {limit} positions.",
        f"Use a prompt of {most} virtual tokens or fewer; with {most}, a text can have the other {limit - most} positions.",
        virtual_tokens=length,
        positions=limit,
        room_for=f"{most} virtual tokens and a text of {text}, the shortest that a prompt is tried with",
    )
