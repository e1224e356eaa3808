"""What is asked of `attach`, checked against the model before anything is changed."""

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
"""How many tokens of text the first probe of a prompt has."""


def check_request(
    model: nn.Module, method: Method, name: str, present: PromptedModel | None, trainable: tuple[str, ...]
) -> None:
    """Check what is asked for against the model and the prompts that it carries.

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
            "a name belongs to one prompt.",
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
    """Check that a prompt leaves room for text.

    Raises:
        PromptTooLongError: it does not.
    """
    positions = structure.entry.positions
    trained = positions.trained if positions.rotary is None else positions.rotary
    limit = positions.limit if positions.limit is not None else trained
    length = method.where.columns
    if method.enters != "branch" and limit is not None and length >= limit:
        raise no_room(length, limit, _LEAST_TEXT)


def no_room(length: int, limit: int, text: int) -> PromptTooLongError:
    """What to say of a prompt that leaves too little room for text.

    Args:
        text: how many tokens of text shall fit beside it.
    """
    room = max(limit - text, 0)
    return PromptTooLongError(
        "a prompt must leave room for text among the model's positions.",
        f"Use a prompt of {room} virtual tokens or fewer; of {room}, texts have the other {limit - room} positions.",
        virtual_tokens=length,
        positions=limit,
        room_for=f"{room} virtual tokens and a text of {text}, the least that a prompt is tried with",
    )
