"""Replace the forward of modules that compute attention inline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import FamilyForward, inline_attention
from softhooks.backbone.inline.decoders import DECODERS
from softhooks.backbone.inline.families import FAMILIES
from softhooks.backbone.stack import Site
from softhooks.backbone.stack_state import RunningPass
from softhooks.errors import UnsupportedModeError

RewrittenForward = Callable[[tuple[Any, ...], dict[str, Any], AttentionFunction], Any]
"""Computes the forward of one module from `args`, `kwargs` and an attention function; returns None if given `_OTHER_STATES`."""

_OTHER_STATES = ("encoder_hidden_states", "query_states", "kv")
"""Arguments that pass states besides the module's own input; the functions in this package do not support them."""


def rewritten_forward(module: nn.Module) -> RewrittenForward | None:
    """Return the rewritten forward of an attention module, or None if it belongs to no family."""
    family = family_of(module) or family_of(module, DECODERS)
    return None if family is None else functools.partial(_run, module, family, argument_names(module))


def family_of(module: nn.Module, families: dict[tuple[str, str], FamilyForward] = FAMILIES) -> FamilyForward | None:
    """Return the forward of an attention module's family, or None if it has none."""
    keys = [(cls.__module__.rpartition(".")[2], cls.__name__) for cls in type(module).__mro__]
    return next((families[key] for key in keys if key in families), None)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's own forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _run(
    module: nn.Module,
    family: FamilyForward,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention: AttentionFunction,
) -> Any:
    call = dict(zip(names, args, strict=False)) | kwargs
    return None if any(call.get(name) is not None for name in _OTHER_STATES) else family(module, call, attention)


def inline_forward(site: Site, current_pass: Callable[[nn.Module], RunningPass | None]) -> Callable[..., Any]:
    """Make a forward for the attention module of `site` that lets the current pass compute the attention.

    Args:
        current_pass: `attention_interface.current_pass`, passed here to avoid a circular import.
    """
    rewritten = rewritten_forward(site.module)
    assert rewritten is not None
    return functools.partial(_forward, site.module, site, rewritten, current_pass)


def _forward(
    module: nn.Module,
    first: Site,
    rewritten: RewrittenForward,
    current_pass: Callable[[nn.Module], RunningPass | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    current = current_pass(module)
    site = first if current is None else current.site_for_call(first)
    if current is None or not current.enters(site):
        return type(module).forward(module, *args, **kwargs)

    def attention(*parts: Any, function: AttentionFunction = inline_attention, **options: Any) -> Any:
        return current.attend(site, function, parts, options)

    output = rewritten(args, kwargs, attention)
    if output is None:
        raise UnsupportedModeError(
            f"{type(module).__name__} was called with encoder or query states; a prefix can only enter self-attention.",
            "Turn the prompt off for this forward with `softhooks.disabled(model)`.",
            given=", ".join(name for name in _OTHER_STATES if name in kwargs) or "positional arguments",
        )
    return output
