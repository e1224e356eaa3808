"""Check the arguments of `attach` before anything in the model is changed."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from torch import nn

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.probing import OTHER_METHOD
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.sharding import refuse_partitioned
from softhooks.errors import AttachError, NameTakenError, PromptTooLongError, UnsupportedMethodError
from softhooks.method import Method
from softhooks.runtime.prompted_model import PromptedModel

_SHORTEST_TEXT = 5
"""The number of text tokens in the first forward pass with which `attach` checks a prompt."""

NAME_RULE = "only letters, digits, - and _, and no name of an attribute of torch's modules"
"""The rule for the names of prompts, for messages."""


def is_prompt_name(name: str) -> bool:
    """Whether a prompt can have this name, which becomes the name of a submodule."""
    taken = hasattr(nn.ModuleDict, name) or name in ("training", "prompted_model")
    return re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and not taken


def require_model(model: object) -> None:
    """Check that the first argument of `attach` or `load` is a model, not its name or an object that contains it."""
    if isinstance(model, nn.Module):
        return
    given = repr(model) if isinstance(model, str | Path) else f"an object of the class {type(model).__name__}"
    if isinstance(getattr(model, "model", None), nn.Module):
        raise AttachError(
            f"a prompt needs a model, but {given} was given.", "Pass the model inside it, its attribute `model`."
        )
    raise AttachError(
        f"a prompt needs a model, but {given} was given.",
        "Load the model first, such as with `AutoModelForCausalLM.from_pretrained`; or load a saved prompt together with its "
        "base model: `softhooks.load_model(prompt)`.",
    )


def check_arguments(
    model: nn.Module, method: Method, name: str, present: PromptedModel | None, trainable: tuple[str, ...]
) -> None:
    """Check the arguments of `attach`; `present` is the state of the prompts that the model already has."""
    require_model(model)
    if isinstance(method, type) and issubclass(method, Method):
        raise UnsupportedMethodError(
            f"attach got the class {method.__name__} instead of a method with its options, such as PromptTuning(20).",
            f"Call the class: `{method.__name__}(...)`; `help(softhooks.{method.__name__})` lists the options.",
        )
    if not isinstance(method, Method):
        raise UnsupportedMethodError(
            f"attach got {type(method).__name__} instead of a method such as PromptTuning(20)."
        )
    if not is_prompt_name(name):
        raise AttachError(f"{name!r} cannot be a prompt's name; use {NAME_RULE}.")
    refuse_partitioned(model)
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise AttachError("the model is compiled, so hooks have no effect.", "Attach before `torch.compile`.")
    if present and name in present.prompts:
        raise NameTakenError(
            f"a prompt named {name!r} is already attached; names must be unique.",
            "Remove the other prompt first, or attach this one under another `name=`.",
            attached=f"{name!r}: {present.prompts[name].method!r}",
            asked=f"{name!r}: {method!r}",
        )
    if present is None and hasattr(model, CONTAINER):
        raise AttachError(
            f"the model already has an attribute {CONTAINER!r}; softhooks stores its prompts under this name."
        )
    names = [parameter for parameter, _ in model.named_parameters()]
    for pattern in trainable:
        if not fnmatch.filter(names, pattern):
            raise AttachError(f"trainable={pattern!r} does not match any parameter of {type(model).__name__}.")


def require_tokens(structure: ModelStructure, method: Method) -> None:
    """Refuse virtual tokens in the sequence if the model does not take token ids."""
    stack = structure.entry
    if method.enters == "embeddings" and not structure.embeds_tokens:
        raise UnsupportedMethodError(
            f"{type(stack.module).__name__} takes `{stack.features}` instead of token ids, so no virtual token can be inserted "
            "into a text.",
            OTHER_METHOD,
            method=method.kind,
        )


def check_length(structure: ModelStructure, method: Method) -> None:
    """Check that the model has more positions than the prompt has virtual tokens."""
    positions = structure.entry.positions
    trained = positions.trained if positions.rotary_limit is None else positions.rotary_limit
    limit = positions.limit if positions.limit is not None else trained
    length = method.token_layout.num_slots
    if method.enters != "branch" and limit is not None and length >= limit:
        raise too_long_error(length, limit, _SHORTEST_TEXT)


def too_long_error(length: int, limit: int, text: int) -> PromptTooLongError:
    """Return the error for a prompt that leaves too few positions for text.

    Args:
        length: the number of virtual tokens.
        limit: the number of positions.
        text: the number of text tokens that need positions too.
    """
    most = max(limit - text, 0)
    return PromptTooLongError(
        f"{length} virtual tokens leave too few of the model's {limit} positions for text.",
        f"Use at most {most} virtual tokens; with {most}, {limit - most} positions remain for text.",
        virtual_tokens=length,
        positions=limit,
        room_for=f"{most} virtual tokens and a text of {text} tokens, which `attach` needs for its checks",
    )
