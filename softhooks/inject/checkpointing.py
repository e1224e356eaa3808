"""Activation checkpointing: a pass that its layers find again when the backward runs them a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.module_walk import every_module
from softhooks.backbone.stack import Site, Stack


class CheckpointedPass(Pass):
    """A pass that puts tensors of a prompt into layers which may be checkpointed.

    Args:
        stack: the stack.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self._anchored: list[Tensor] = []
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._closed = False

    def follow_checkpointing(self) -> None:
        """Make each checkpointed layer remember this pass, for the backward runs it again when the pass is over."""
        for module in every_module(self.stack.module):
            if "_gradient_checkpointing_func" in module.__dict__ and is_checkpointed(module):
                function: Any = module._gradient_checkpointing_func
                self._replaced.append((module, function))
                module._gradient_checkpointing_func = _Remembering(self, function)  # type: ignore[assignment]
                if not self._anchored and _is_reentrant(function):
                    self.detach_injected()

    def detach_injected(self) -> None:
        """Put `cut_off` tensors in the place of what this pass injects.

        A reentrant checkpoint runs a backward of its own in every layer; the prompt's graph behind what is injected would be
        used up by the first one. Leaves only collect, and the anchor at the embedding, which is last in the backward, passes on.
        """
        raise NotImplementedError(f"{type(self).__name__} must detach what it injects.")

    def cut_off(self, tensor: Tensor) -> Tensor:
        """Make a leaf that stands for a tensor, whose gradient `embed` hands on."""
        leaf = tensor.detach().requires_grad_(tensor.requires_grad)
        self._anchored += [tensor, leaf]
        return leaf

    def embed(self, output: Tensor) -> Tensor:
        """Anchor the prompt's graph at the text's embeddings, where a reentrant checkpoint asks for it."""
        if not self._anchored or not torch.is_grad_enabled():
            return output
        anchored: Tensor = _Anchor.apply(output, *self._anchored)  # type: ignore[no-untyped-call]
        return anchored

    def prepare(self) -> list[Any]:
        """Register the hooks that layers need besides the pass, for the pass or for a layer that runs again after it."""
        return []

    def close(self) -> None:
        """Give every layer its own checkpointing function back."""
        super().close()
        self._closed = True
        for module, function in self._replaced:
            module._gradient_checkpointing_func = function
        self._replaced.clear()


class Through(CheckpointedPass):
    """A forward in which attention is left alone: of the bare model, or with virtual tokens in the sequence itself."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.touched = True

    def turn(self, site: Site) -> Site:
        """Count no calls: all are alike."""
        return site

    def detach_injected(self) -> None:
        """Nothing is put in."""


class _Remembering:
    """A checkpointing function that runs, and runs again, its layer inside the pass of its forward."""

    def __init__(self, live: CheckpointedPass, function: Callable[..., Any]) -> None:
        self.live = live
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stack, calls = self.live.stack, dict(self.live.calls)

        def inside(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if not self.live._closed and stack.state.current is not None:
                return layer(*inner_args, **inner_kwargs)
            with stack.state.running(self.live, alone="a backward"):
                self.live.calls = dict(calls)  # the second run is the same turn as the first
                handles = self.live.prepare() if self.live._closed else []
                try:
                    return layer(*inner_args, **inner_kwargs)
                finally:
                    for handle in handles:
                        handle.remove()

        return self.function(inside, *args, **kwargs)


class _Anchor(torch.autograd.Function):
    """Hand the text's embeddings through; in the backward, hand the leaves' gradients to what they were cut from."""

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
    """Whether a module is asked to checkpoint its layers, or itself; most modules know nothing of it, and are asked quickly."""
    own = module.__dict__.get("gradient_checkpointing")
    return bool(getattr(type(module), "gradient_checkpointing", False) if own is None else own)


def _is_reentrant(function: Any) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
