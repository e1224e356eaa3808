"""Wrap the attention functions of transformers, so that a module with a mark on it goes through its pass.

The entries of the global mapping and the `eager_attention_forward` of the model files concerned are wrapped while any prompt is
attached anywhere, and put back with the last one. `config._attn_implementation` is never touched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_utils import AttentionInterface

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline_attention import rewrite, unwrite
from softhooks.backbone.stack import Site, Stack
from softhooks.backbone.stack_state import RunningPass
from softhooks.errors import PromptNotReachedError
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches

MARK = "_softhooks_site"
"""The attribute of an attention module that holds its `Site`, the first of several where it serves several layers."""

_EAGER = "eager_attention_forward"


def files_of(modules: Iterable[nn.Module]) -> frozenset[str]:
    """The names of the Python modules whose `eager_attention_forward` these modules call, if they call one."""
    return frozenset(type(module).__module__ for module in modules)


def open_interface(user: object, files: Iterable[str]) -> None:
    """Wrap the attention functions that modules of these files can call, for as long as `user` is open and alive."""
    users.add(user, files)


def close_interface(user: object) -> None:
    """Put the original functions back, if nobody else uses the wrapped ones."""
    users.discard(user)


def mark(stacks: Iterable[Stack]) -> None:
    """Put every site's mark on its attention module."""
    for stack in stacks:
        for site in stack.sites:
            if not site.turns or site is site.turns[0]:
                site.module.__dict__[MARK] = site
                if stack.through == "written_out":
                    rewrite(site, pass_of)


def unmark(stacks: Iterable[Stack]) -> None:
    """Take the marks away."""
    for stack in stacks:
        for site in stack.sites:
            site.module.__dict__.pop(MARK, None)
            if stack.through == "written_out":
                unwrite(site.module)


class _Reader:
    """A user of the interface for a moment."""


@contextmanager
def marked(stack: Stack) -> Iterator[None]:
    """Have a stack's marks in place, whether a prompt is attached or not."""
    there = any(MARK in site.module.__dict__ for site in stack.sites)
    if there:
        yield
        return
    reader = _Reader()
    open_interface(reader, files_of(stack.module.modules()))
    mark([stack])
    try:
        yield
    finally:
        unmark([stack])
        close_interface(reader)


def _wrap_functions(patches: Patches, files: Iterable[str]) -> None:
    functions: dict[str, AttentionFunction] = AttentionInterface._global_mapping
    namespaces = [vars(sys.modules[name]) for name in files if name in sys.modules]
    wanted = [(functions, name) for name in functions]
    wanted += [(namespace, _EAGER) for namespace in namespaces if _EAGER in namespace]
    for mapping, name in wanted:
        if not hasattr(mapping[name], MARK):  # else it is wrapped already, perhaps under a wrapper of somebody else
            patches.set(mapping, name, _dispatching(mapping[name]))


users: SharedPatches[object] = SharedPatches(_wrap_functions)
"""Who needs the wrapped functions: models with a prompt, and readers for a moment."""


def _dispatching(attention: AttentionFunction) -> AttentionFunction:
    """Send marked modules through their pass; everything else goes to the function as it was."""

    @functools.wraps(attention)
    def dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        live = pass_of(module)
        if live is None:
            return attention(module, *args, **kwargs)
        return live.attend(live.turn(module.__dict__[MARK]), attention, (module, *args), kwargs)

    setattr(dispatch, MARK, None)
    return dispatch


def pass_of(module: nn.Module) -> RunningPass | None:
    """The pass that is under way in the stack of an attention module, if it is marked.

    Raises:
        PromptNotReachedError: none is, and a prompt is on.
        UnsupportedModeError: none is in this thread, while another one runs the model.
    """
    site: Site | None = module.__dict__.get(MARK)
    if site is None:
        return None
    state = site.stack.state
    current = state.current
    if current is None and not state.expects_pass():
        return None
    if current is None:
        if state.owner is not None:
            state.owner.running.require_free()
        raise PromptNotReachedError(
            "an attention layer may only run inside a forward that went through the model's hooks.",
            "Call the model, not its `forward`; checkpoint its layers with `gradient_checkpointing_enable()`; or "
            "turn the prompt off with `softhooks.disabled(model)`.",
            layer=f"{type(module).__name__} of {site.stack.path or 'the model'}",
        )
    return current
