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
    """A pass that injects tensors of a prompt into layers that may be checkpointed.

    Args:
        stack: the stack.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self._anchored: list[Tensor] = []
        self._checkpointed: list[nn.Module] = []
        self._patches = Patches()
        self._closed = False

    def follow_checkpointing(self) -> None:
        """Make each checkpointed layer run inside this pass again when the backward recomputes it after the forward has ended."""
        for module in every_module(self.stack.module):
            if _FUNCTION in module.__dict__ and is_checkpointed(module):
                function: Any = module.__dict__[_FUNCTION]
                self._checkpointed.append(module)
                self._patches.set(module, _FUNCTION, _ReenteringCheckpoint(self, function))
                if not self._anchored and _is_reentrant(function):
                    self.detach_injected()

    def detach_injected(self) -> None:
        """Replace the tensors that this pass injects by leaves of the autograd graph, made by `leaf_of`.

        A reentrant checkpoint runs a separate backward for each layer, and the first would free the prompt's graph. Leaves
        accumulate the gradients of all layers; the anchor at the embedding, whose backward runs last, passes them on.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement `detach_injected`.")

    def leaf_of(self, tensor: Tensor) -> Tensor:
        """Make a leaf that replaces a tensor; the anchor passes its gradient on to the tensor."""
        leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        self._anchored += [tensor, leaf]
        return leaf

    def embed(self, output: Tensor) -> Tensor:
        """Anchor the prompt's graph at the text's embeddings, if a reentrant checkpoint needs it."""
        if not self._anchored or not torch.is_grad_enabled():
            return output
        anchored: Tensor = _Anchor.apply(output, *self._anchored)  # type: ignore[no-untyped-call]
        return anchored

    def prepare(self) -> list[Any]:
        """Register further hooks on layers, for the forward or for a layer that is recomputed in the backward."""
        return []

    def close(self) -> None:
        """Restore every layer's own checkpointing function."""
        super().close()
        self._closed = True
        self._patches.undo()


class UnchangedPass(CheckpointedPass):
    """A forward with unchanged attention: no prompt is active, none enters this stack, or the prompts enter as slots."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.has_injected = True

    def site_for_call(self, site: Site) -> Site:
        """Return the site as it is. This pass changes no attention, so it need not count the calls of a shared module."""
        return site

    def detach_injected(self) -> None:
        """Do nothing: nothing is injected."""


class _ReenteringCheckpoint:
    """A checkpointing function that runs its layer inside the pass of the forward, also when the backward reruns the layer."""

    def __init__(self, forward_pass: CheckpointedPass, function: Callable[..., Any]) -> None:
        self.forward_pass = forward_pass
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stack, calls = self.forward_pass.stack, dict(self.forward_pass.calls)

        def inside(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if not self.forward_pass._closed and stack.state.current is not None:
                return layer(*inner_args, **inner_kwargs)
            with stack.state.running(self.forward_pass, alone="a backward"):
                # Reset to the counts before the first run, so that a shared module stands for the same layer again.
                self.forward_pass.calls = dict(calls)
                handles = self.forward_pass.prepare() if self.forward_pass._closed else []
                try:
                    return layer(*inner_args, **inner_kwargs)
                finally:
                    for handle in handles:
                        handle.remove()

        return self.function(inside, *args, **kwargs)


class _Anchor(torch.autograd.Function):
    """Return the text's embeddings; in the backward, pass the leaves' gradients to the tensors that they replace."""

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


def _is_reentrant(function: Any) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
