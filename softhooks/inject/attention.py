"""A key-value prefix at the attention function: the pass, and the masks that it needs.

The prefix never enters the model's cache, so static caches, cropped caches, returned caches and activation checkpointing see
what they would see without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.anatomy import Role, Site, Stack
from softhooks.errors import UnsupportedModeError, explain
from softhooks.inject.keyvalues import KeyValues
from softhooks.inject.passes import AttentionFunction, Pass

_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


class PrefixPass(Pass):
    """Keys and values before those of the text, at each site.

    Args:
        stack: the stack.
        prefixes: keys and values by role.
        positions: where the queries stand in the text, counted from 0 in each row or document, [B or 1, T].
        training: whether layers may be checkpointed in this forward.
    """

    def __init__(
        self, stack: Stack, prefixes: dict[Role, KeyValues], positions: Tensor | None, training: bool = False
    ) -> None:
        super().__init__(stack)
        self.prefixes = prefixes
        self.positions = positions
        self._masks: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._anchored: list[Tensor] = []
        self._replaced: list[tuple[nn.Module, Any]] = []
        if training:
            self._follow_checkpointing()

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function over the prefix and the text."""
        prefix = self.prefixes.get(site.role)
        if prefix is None:
            return attention(*args, **kwargs)
        self.touched = True
        module, query, key, value, mask, *rest = args if len(args) > 4 else (*args, kwargs.pop("attention_mask", None))
        flash = attention.__name__.startswith("flash")  # knows, without a mask, which of the keys are text
        if mask is None and not flash and _is_causal(module, kwargs) and key.shape[2] > query.shape[2] > 1:
            # An empty static cache: the keys behind the queries are blank, and no mask says so.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = self._mask(site, attention, module, query, key, mask, kwargs)
        key, value = prefix.before(site.index, key, value)
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs = {**kwargs, "position_bias": functional.pad(bias, (prefix.length, 0))}
        output, weights = attention(module, query, key, value, mask, *rest, **kwargs)
        return output, weights if weights is None else weights[..., prefix.length :]

    def _mask(
        self,
        site: Site,
        attention: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: Any,
    ) -> Any:
        """Widen the mask over the prefix; equal for all layers with one window, so built once a forward."""
        name = attention.__name__
        refuse_attention(name, kwargs)
        window = _window(module, kwargs) if site.role == "self" and self.stack.causal else None
        causal = mask is None and query.shape[2] > 1 and _is_causal(module, kwargs)

        def build() -> Any:
            visible = self._visible(site.role, window, query.device)
            return widen_mask(mask, self.prefixes[site.role].length, visible, causal, query, key, name)

        if torch.compiler.is_compiling():
            return build()
        place = (site.role, window, causal, id(mask), name, query.dtype, query.device, key.shape[2])
        if place not in self._masks:
            self._masks[place] = (mask, build())  # the old mask is kept too: its id must not be used again
        return self._masks[place][1]

    def _visible(self, role: Role, window: int | None, device: torch.device) -> Tensor | None:
        """Which virtual tokens each query sees, [B or 1, 1, T or 1, P] bool; None: all of them."""
        prefix = self.prefixes[role]
        present = prefix.present(device)
        visible = None if present is None else present[:, None, None, :]
        if window is not None and prefix.windowed is not False and self.positions is not None:
            columns = torch.arange(prefix.length, device=device)
            distance = self.positions.to(device)[:, :, None] + prefix.length - columns
            near = (distance < window)[:, None]
            if isinstance(prefix.windowed, Tensor):
                near = near | ~prefix.windowed.to(device)[:, None, None, None]
            visible = near if visible is None else near & visible
        return visible

    # --- activation checkpointing -------------------------------------------------------------------------------------

    def _follow_checkpointing(self) -> None:
        """Make each checkpointed layer remember this pass, for the backward runs it again when the pass is over."""
        for module in self.stack.module.modules():
            if getattr(module, "gradient_checkpointing", False) and "_gradient_checkpointing_func" in module.__dict__:
                function: Any = module._gradient_checkpointing_func
                self._replaced.append((module, function))
                module._gradient_checkpointing_func = _Remembering(self, function)  # type: ignore[assignment]
                if not self._anchored and _is_reentrant(function):
                    self._detach_prefixes()

    def _detach_prefixes(self) -> None:
        """Cut the prefix into leaves whose gradients `embed` hands on.

        A reentrant checkpoint runs a backward of its own in every layer; the prompt's graph behind the prefix would be used up
        by the first one. Leaves only collect, and the anchor at the embedding, which is last in the backward, passes on.
        """
        for role, prefix in self.prefixes.items():
            leaves: list[dict[int, Tensor]] = []
            for tensors in (prefix.keys, prefix.values):
                leaves.append({i: t.detach().requires_grad_(t.requires_grad) for i, t in tensors.items()})
                self._anchored += [tensor for i, t in tensors.items() for tensor in (t, leaves[-1][i])]
            self.prefixes[role] = replace(prefix, keys=leaves[0], values=leaves[1])

    def embed(self, output: Tensor) -> Tensor:
        """Anchor the prompt's graph at the text's embeddings, where a reentrant checkpoint asks for it."""
        if not self._anchored or not torch.is_grad_enabled():
            return output
        anchored: Tensor = _Anchor.apply(output, *self._anchored)  # type: ignore[no-untyped-call]
        return anchored

    def close(self) -> None:
        """Give every layer its own checkpointing function back."""
        super().close()
        for module, function in self._replaced:
            module._gradient_checkpointing_func = function
        self._replaced.clear()


class _Remembering:
    """A checkpointing function that runs, and runs again, its layer inside the pass of its forward."""

    def __init__(self, live: PrefixPass, function: Callable[..., Any]) -> None:
        self.live = live
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stack = self.live.stack

        def inside(*inner_args: Any, **inner_kwargs: Any) -> Any:
            outer, stack.live = stack.live, self.live
            try:
                return layer(*inner_args, **inner_kwargs)
            finally:
                stack.live = outer

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


def _is_reentrant(function: Any) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    return window if isinstance(window, int) and window > 0 else None


def refuse_attention(name: str, kwargs: dict[str, Any]) -> None:
    """Refuse the attention functions whose masks a prefix cannot be written into.

    Raises:
        UnsupportedModeError: for flex and paged attention, and for packed flash attention.
    """
    packed = name.startswith("flash") and any(kwargs.get(key) is not None for key in _PACKED_ARGUMENTS)
    if "flex" in name or "paged" in name or packed:
        raise UnsupportedModeError(
            explain(
                "a key-value prefix needs an attention function whose mask it can widen.",
                "Use `model.set_attn_implementation('sdpa')` or 'eager'.",
                function=name + (" with packed sequences" if packed else ""),
            )
        )


def widen_mask(
    mask: Any, length: int, visible: Tensor | None, causal: bool, query: Tensor, key: Tensor, function: str
) -> Any:
    """Put the prefix's columns before those of a mask.

    Args:
        mask: None; [B, K] (flash); or [B, 1 or H, T, K], bool (True: seen) or additive.
        length: P.
        visible: which virtual tokens each query sees, [B or 1, 1, T or 1, P]; None: all.
        causal: whether None means "each query sees the keys up to its own".
        query, key: for their shapes, precision and device, before the prefix is put in.
        function: the name of the attention function.

    Shape:
        -> the same kind of mask with P + K columns, or None where everything is seen.
    """
    if function.startswith("flash"):
        return _widen_flat_mask(mask, length, visible)
    if mask is None and not causal and visible is None:
        return None
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries) if causal else mask
        if function != "sdpa_attention_forward":
            mask = _additive(mask, query.dtype)
    if visible is None:
        visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        visible = _additive(visible, mask.dtype)
    rows = max(mask.shape[0], visible.shape[0])
    visible = visible.expand(rows, mask.shape[1], mask.shape[2], -1)
    return torch.cat([visible, mask.expand(rows, -1, -1, -1)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _widen_flat_mask(mask: Tensor | None, length: int, visible: Tensor | None) -> Tensor | None:
    """Widen the [B, K] mask of flash attention, which is causal from the lower right on its own."""
    if visible is not None:
        raise UnsupportedModeError(
            explain(
                "flash attention shows every query the whole prefix.",
                "Use `model.set_attn_implementation('sdpa')` for prompts of different lengths in one batch and for models "
                "with sliding windows.",
                asked="a prefix that some queries do not see",
            )
        )
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=-1)
