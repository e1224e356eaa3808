"""Wrap the attention functions of transformers so that a `Pass` can change the attention of marked modules.

A module is marked by an attribute that holds its `Site`. The functions in `ALL_ATTENTION_FUNCTIONS` and the
`eager_attention_forward` of each modeling file are wrapped while any model has a prompt, and restored when the last prompt is
removed. `config._attn_implementation` is never changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from softhooks.backbone.decoder_attention import replace_attention
from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.rewritten_forward import inline_forward
from softhooks.backbone.stack import Site, Stack
from softhooks.backbone.stack_state import RunningPass, StackState
from softhooks.errors import PromptNotReachedError
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches

MARK = "_softhooks_site"
"""The attribute of an attention module that holds its `Site`, or the first of its sites if several layers share the module."""

_EAGER = "eager_attention_forward"


# --- wrapping the functions -------------------------------------------------------------------------------------------


def modeling_files(modules: Iterable[nn.Module]) -> frozenset[str]:
    """Return the names of the Python modules that define the classes of these `nn.Module` objects."""
    return frozenset(type(module).__module__ for module in modules)


def _wrap_functions(patches: Patches, files: Iterable[str]) -> None:
    functions: dict[str, AttentionFunction] = AttentionInterface._global_mapping
    namespaces = [vars(sys.modules[name]) for name in files if name in sys.modules]
    wanted = [(functions, name) for name in functions]
    wanted += [(namespace, _EAGER) for namespace in namespaces if _EAGER in namespace]
    for mapping, name in wanted:
        if not hasattr(mapping[name], MARK):  # else already wrapped, perhaps beneath another library's wrapper
            patches.set(mapping, name, _wrapper_of(mapping[name]))


users: SharedPatches[object] = SharedPatches(_wrap_functions)
"""The models with a prompt and the probe forwards that need the wrapped functions. `users.add(user, files)` also wraps the
functions in `files`; the last `users.discard(user)` restores the originals."""


def _wrapper_of(attention: AttentionFunction) -> AttentionFunction:
    @functools.wraps(attention)
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = current_pass(module)
        if current is None:
            return attention(module, *args, **kwargs)
        site = current.site_for_call(module.__dict__[MARK])
        if current.check_attention is not None:
            current.check_attention(site, attention, (module, *args), kwargs)
        return current.attend(site, attention, (module, *args), kwargs)

    setattr(attend, MARK, None)  # tells `_wrap_functions` that this function is a wrapper
    return attend


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _expects_pass(state: StackState) -> bool:
    """Whether a pass should be running; if none is, the prompt's hooks were bypassed."""
    if state.owner is None:
        return False
    if torch._C._current_graph_task_id() != -1:  # backward reruns checkpointed layers, maybe with the prompt off
        return any(prompt.injection != "slots" for prompt in state.owner.prompts.values())
    return state.owner.is_in_use


def current_pass(module: nn.Module) -> RunningPass | None:
    """Return the running pass of an attention module's stack, or None if there is none.

    Raises:
        PromptNotReachedError: a prompt is active, but its hooks did not run.
    """
    site: Site | None = module.__dict__.get(MARK)
    if site is None:
        return None
    state = site.stack.state
    current = state.current
    if current is None and _expects_pass(state):
        raise PromptNotReachedError(
            f"{type(module).__name__} ran outside a call to the model, so the prompt's hooks did not run.",
            "Call the model, not the `forward` of one of its modules; checkpoint its layers with "
            "`gradient_checkpointing_enable()`; or turn the prompt off with `softhooks.disabled(model)`.",
            stack=site.stack.path or "the model itself",
        )
    return current


# --- marking the modules ----------------------------------------------------------------------------------------------


def mark_sites(stacks: Iterable[Stack], patches: Patches) -> None:
    """Mark every attention module that keys and values can enter; if it computes attention inline, also replace its forward."""
    for stack in stacks:
        for site in stack.sites:
            if not site.shared_sites or site is site.shared_sites[0]:
                patches.set(site.module, MARK, site)
                if stack.injection == "written_out":
                    patches.set(site.module, "forward", inline_forward(site, current_pass))
                elif site.scaling is not None:
                    replace_attention(site, current_pass, patches)


@contextmanager
def wrapped_functions(modules: Iterable[nn.Module]) -> Iterator[Patches]:
    """Wrap the attention functions while the `with` block runs; yield a `Patches` object whose patches are undone after it."""
    with Patches() as patches:
        users.add(patches, modeling_files(modules))
        try:
            yield patches
        finally:
            users.discard(patches)


@contextmanager
def marked_sites(stack: Stack) -> Iterator[None]:
    """Mark the attention modules of a stack while the `with` block runs, even if no prompt is attached."""
    if any(MARK in site.module.__dict__ for site in stack.sites):
        yield
        return
    with wrapped_functions(stack.module.modules()) as patches:
        mark_sites([stack], patches)
        yield
