"""Passes that support activation checkpointing, in which the backward runs layers a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.module_walk import every_module
from softhooks.backbone.stack import Site, Stack
from softhooks.patching.patches import Patches

_FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers stores the checkpointing function of a module."""


class CheckpointedPass(Pass):
    """A pass that injects a prompt into layers that may be checkpointed."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self._anchored: list[Tensor] = []
        self._checkpointed: list[nn.Module] = []
        self._patches = Patches()
        self._closed = False

    def follow_checkpointing(self) -> None:
        """Make checkpointed layers run inside this pass again when the backward recomputes them."""
        for module in every_module(self.stack.module):
            if _FUNCTION in module.__dict__ and is_checkpointed(module):
                function: Any = module.__dict__[_FUNCTION]
                self._checkpointed.append(module)
                self._patches.set(module, _FUNCTION, _reentering(self, function))
                if not self._anchored and getattr(function, "keywords", {}).get("use_reentrant", False):
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
        """Connect the leaves to the text's embeddings; there are leaves only with reentrant checkpointing."""
        if not self._anchored or not torch.is_grad_enabled():
            return output
        anchored: Tensor = _Anchor.apply(output, *self._anchored)  # type: ignore[no-untyped-call]
        return anchored

    def prepare(self) -> list[Any]:
        """Register further hooks on layers and return their handles; called again when the backward recomputes a layer."""
        return []

    def close(self) -> None:
        """Remove the hooks, and restore every layer's own checkpointing function."""
        super().close()
        self._closed = True
        self._patches.undo()


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


def _reentering(forward_pass: CheckpointedPass, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpointing function so that the layer runs inside `forward_pass` again when the backward reruns it."""
    stack = forward_pass.stack

    def checkpoint(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls = dict(forward_pass.calls)

        def inside(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if not forward_pass._closed and stack.state.current is not None:
                return layer(*inner_args, **inner_kwargs)
            with stack.state.running(forward_pass, alone="a backward"):
                # Restore the counts from before the first run, so that a shared module stands for the same layer again.
                forward_pass.calls = dict(calls)
                handles = forward_pass.prepare() if forward_pass._closed else []
                try:
                    return layer(*inner_args, **inner_kwargs)
                finally:
                    for handle in handles:
                        handle.remove()

        return function(inside, *args, **kwargs)

    return checkpoint


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
