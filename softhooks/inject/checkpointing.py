"""Passes that support activation checkpointing, in which the backward runs layers a second time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.module_walk import every_module
from softhooks.backbone.stack import Site, Stack

_FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers stores the checkpointing function of a module."""


class CheckpointedPass(Pass):
    """A pass that injects a prompt into layers that may be checkpointed."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self._anchored: list[Tensor] = []
        self._checkpointed: list[nn.Module] = []
        self._closed = False

    @property
    def recomputed_in(self) -> Pass | None:
        """This pass, after `follow_checkpointing`."""
        return self if self._checkpointed else None

    def follow_checkpointing(self) -> None:
        """Make checkpointed layers run inside this pass again when the backward recomputes them."""
        self._checkpointed = checkpointed_modules(self.stack)
        if any(getattr(module.__dict__[_FUNCTION], "is_reentrant", False) for module in self._checkpointed):
            self.detach_injected()

    def detach_injected(self) -> None:
        """Replace the injected tensors with leaves of the autograd graph, made by `leaf_of`.

        A reentrant checkpoint runs a separate backward for each layer, and the first one would free the prompt's graph. A leaf
        collects the gradients of all layers. `_Anchor` passes them on to the prompt in the backward of the text's embeddings,
        which runs last.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement `detach_injected`.")

    def leaf_of(self, tensor: Tensor) -> Tensor:
        """Return a leaf with the values of a tensor; `_Anchor` passes the leaf's gradient on to the tensor."""
        leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        self._anchored += [tensor, leaf]
        return leaf

    def embed(self, output: Tensor) -> Tensor:
        """Connect the leaves to the text's embeddings, or to the features; there are leaves only with reentrant checkpointing."""
        if not self._anchored or not torch.is_grad_enabled():
            return output
        anchored: Tensor = _Anchor.apply(output, *self._anchored)  # type: ignore[no-untyped-call]
        return anchored

    def close(self) -> None:
        """End the forward; layers that run from now on are recomputed by a backward."""
        self._closed = True


class UnchangedPass(CheckpointedPass):
    """A forward with unchanged attention: no prompt is active, no prompt enters this stack, or the prompts enter as slots."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.has_injected = True

    def site_for_call(self, site: Site) -> Site:
        """Return `site`; as attention is unchanged, it does not matter which of the layers that share a module is running."""
        return site

    def detach_injected(self) -> None:
        """Do nothing: nothing is injected."""


# --- what is set on the modules of a model ----------------------------------------------------------------------------
# It stays there until the last prompt is removed, because several threads may be training. It asks for the thread's own pass.


class RecomputingFunction:
    """Replaces the checkpointing function of a module: a recomputed layer runs inside the pass of its first run again."""

    def __init__(self, stack: Stack, function: Callable[..., Any]) -> None:
        self.stack = stack
        self.function = function

    @property
    def is_reentrant(self) -> bool:
        """Whether the function is a reentrant checkpoint."""
        return bool(getattr(self.function, "keywords", {}).get("use_reentrant", False))

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a layer."""
        current = self.stack.state.current
        forward_pass = None if current is None else current.recomputed_in
        inside = layer if forward_pass is None else _reentering(forward_pass, layer)
        return self.function(inside, *args, **kwargs)


class CheckpointingFlag:
    """Replaces the flag of a module that activates checkpointing; it is off in a pass that does not allow checkpointing."""

    def __init__(self, stack: Stack, _before: bool) -> None:
        self.stack = stack

    def __bool__(self) -> bool:
        current = self.stack.state.current
        return current is None or current.allows_checkpointing


class CacheFlag:
    """Replaces the flag of a layer that keeps the cache when the layer is checkpointed; it is on in a pass that needs the cache.

    Args:
        before: the layer's own flag.
    """

    def __init__(self, stack: Stack, before: bool) -> None:
        self.stack = stack
        self.before = before

    def __bool__(self) -> bool:
        current = self.stack.state.current
        return self.before or (current is not None and current.keeps_cache)


def checkpointed_modules(stack: Stack) -> list[nn.Module]:
    """Return the modules of a stack that are checkpointed, after replacing their checkpointing functions."""
    found = [part for part in every_module(stack.module) if _FUNCTION in part.__dict__ and is_checkpointed(part)]
    for module in found:
        replace_once(stack, module, _FUNCTION, RecomputingFunction)
    return found


def ask_pass_for_checkpointing(stack: Stack) -> None:
    """Replace the checkpointing flags of a stack's modules."""
    for module in every_module(stack.module):
        if is_checkpointed(module):
            replace_once(stack, module, "gradient_checkpointing", CheckpointingFlag)


def replace_once(stack: Stack, module: nn.Module, name: str, kind: type[Any]) -> None:
    """Replace an attribute of a module. If it is replaced already, do nothing. Removing the last prompt restores it.

    Args:
        kind: the class of the new value, which is made from the stack and the old value.
    """
    if isinstance(getattr(module, name), kind):
        return
    with _LOCK:
        if stack.state.owner is not None and not isinstance(getattr(module, name), kind):
            stack.state.owner.patches.set(module, name, kind(stack, getattr(module, name)))


_LOCK = threading.Lock()


def _reentering(forward_pass: CheckpointedPass, layer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpointed layer so that it runs inside `forward_pass` again when the backward reruns it."""
    stack, calls = forward_pass.stack, dict(forward_pass.calls)

    def inside(*args: Any, **kwargs: Any) -> Any:
        if not forward_pass._closed and stack.state.current is not None:
            return layer(*args, **kwargs)
        with stack.state.call("a backward"), stack.state.running(forward_pass):
            # Restore the counts from before the first run, so that a shared module stands for the same layer again.
            forward_pass.calls = dict(calls)
            return layer(*args, **kwargs)

    return inside


class _Anchor(torch.autograd.Function):
    """Return the text's embeddings; in the backward, pass each leaf's gradient to the tensor that the leaf replaces."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *pairs: Tensor) -> Tensor:
        ctx.leaves = pairs[1::2]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        handed: list[Tensor | None] = [grad]
        for leaf in ctx.leaves:
            handed += [leaf.grad, None]
        return tuple(handed)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether activation checkpointing is on for a module or its layers."""
    # Read from `__dict__`: `getattr` on a module without the attribute is slow, and this runs for every module.
    own = module.__dict__.get("gradient_checkpointing")
    return bool(getattr(type(module), "gradient_checkpointing", False) if own is None else own)
