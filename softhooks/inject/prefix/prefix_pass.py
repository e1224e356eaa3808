"""Key-value prefixes that are added in each call to the attention function.

The prefix is never written to the model's cache, so checkpointing and every kind of cache work as they do without a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction, function_name
from softhooks.backbone.stack import Role, Site, Stack
from softhooks.backbone.windows import require_one_chunk, window_of
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.prefix.joint_rows import attend_jointly, joining_pays, joint_mask
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.masks import refuse_attention, widen_mask
from softhooks.inject.prefix.merged_attention import (
    additive_mask,
    can_merge,
    cast_by_autocast,
    joined_mask,
    merged_attention,
)
from softhooks.inject.prefix.paged_cache import PrefixedPagedCache, paged_cache
from softhooks.inject.prefix.recompute import recomputed


class PrefixPass(CheckpointedPass):
    """A forward with a prefix, whose keys and values come before the text's keys and values at each attention layer.

    Args:
        prefixes: the prefix's keys and values, by kind of attention (`self` or `cross`).
        positions: the queries' positions in the text, counted from 0 in each row or document, [B or 1, T].
        training: whether layers may be checkpointed in this forward.
    """

    def __init__(
        self, stack: Stack, prefixes: dict[Role, KeyValues], positions: Tensor | None, training: bool = False
    ) -> None:
        super().__init__(stack)
        own = prefixes.get("self")
        require_one_chunk(stack, 0 if own is None or own.windowed is False else own.longest, positions)
        self.prefixes = prefixes
        self.positions = positions
        self._masks: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        if training:
            self.follow_checkpointing()

    def enters(self, site: Site) -> bool:
        """Whether a layer has a prefix."""
        return site.role in self.prefixes and site.index in self.prefixes[site.role].keys

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function over the prefix and the text."""
        if not self.enters(site):
            return attention(*args, **kwargs)
        self.has_injected = True
        prefix = self.prefixes[site.role]
        module, query, key, value, mask, *rest = args if len(args) > 4 else (*args, kwargs.pop("attention_mask", None))
        function = function_name(attention)
        causal = mask is None and self._is_causal(site, function, kwargs)
        # Flash attention aligns queries with the last keys by itself.
        if causal and not function.startswith("flash") and key.shape[2] > query.shape[2] > 1:
            # An empty static cache: the keys after the queries are blank, and no mask hides them.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if can_merge(attention, prefix, (module, query, key, value, mask, *rest), kwargs):
            return self._attend_merged(site, (query, key, value), mask, kwargs, causal)
        if site.role == "self" and joining_pays(function, prefix, query, key, mask, kwargs):
            joined = self._joined_mask(site, query, mask, kwargs, causal)
            return attend_jointly(attention, prefix, site.index, (module, query, key, value, joined, *rest), kwargs)
        mask = self._mask(site, function, query, key, mask, kwargs, causal)
        paged = paged_cache(kwargs)
        if paged is not None:
            kwargs = {**kwargs, "cache": PrefixedPagedCache(paged, prefix, site.index)}
            output, _ = attention(module, query, key, value, mask, *rest, **kwargs)
            return output, None
        whole = prefix.before(site.index, key, value)
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs = {**kwargs, "position_bias": functional.pad(bias, (prefix.length, 0))}
        with recomputed(prefix, site.index, (key, value), whole):
            output, weights = attention(module, query, *whole, mask, *rest, **kwargs)
        return output, weights if weights is None else weights[..., prefix.length :]

    def _attend_merged(
        self,
        site: Site,
        parts: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        kwargs: dict[str, Any],
        causal: bool,
    ) -> tuple[Tensor, None]:
        """Attend to the prefix and to the text separately. -> [B, T, Hq, D], and no attention weights."""
        query, key, value = cast_by_autocast(*parts)
        prefix = self.prefixes[site.role]
        window = window_of(site, kwargs) if site.role == "self" and self.stack.causal else None
        shared = query.dtype, query.device, query.shape[0], query.shape[2]

        def hidden() -> Tensor | None:
            visible = self._visible(site, window, query)
            return None if visible is None else joined_mask(visible, query)

        additive = None
        if mask is not None:
            additive = self._once(mask, site, ("text", *shared), lambda: additive_mask(mask, query.dtype))
        output = merged_attention(
            query,
            (prefix.keys[site.index].to(query), prefix.values[site.index].to(query)),
            (key, value),
            additive,
            self._once(None, site, ("prefix", site.role, window, *shared), hidden),
            causal=causal and query.shape[2] > 1,
            scale=kwargs.get("scaling"),
        )
        return output.transpose(1, 2).contiguous(), None

    def _mask(
        self, site: Site, function: str, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any], causal: bool
    ) -> Any:
        """Extend a layer's mask to cover the prefix. Layers with the same window share one mask, built once per forward."""
        window = window_of(site, kwargs) if site.role == "self" else None
        everywhere = not self.stack.causal or self.prefixes[site.role].windowed is False
        refuse_attention(function, kwargs, cut=window is not None and everywhere, masked=isinstance(mask, Tensor))
        window = window if self.stack.causal else None  # in an encoder, the mask alone applies the window
        causal = causal and query.shape[2] > 1

        def build() -> Any:
            visible = self._visible(site, window, query)
            return widen_mask(mask, self.prefixes[site.role].length, visible, causal, query, key, function)

        if torch.compiler.is_compiling():
            return build()
        shape = (query.shape[2], key.shape[2])
        return self._once(mask, site, (site.role, window, causal, function, query.dtype, query.device, shape), build)

    def _joined_mask(self, site: Site, query: Tensor, mask: Any, kwargs: dict[str, Any], causal: bool) -> Tensor:
        """Return the mask of the joined rows, built once per forward."""
        window = window_of(site, kwargs) if self.stack.causal else None
        causal = causal and query.shape[2] > 1

        def build() -> Tensor:
            return joint_mask(mask, self._visible(site, window, query), self.prefixes[site.role], query, causal)

        joint: Tensor = self._once(mask, site, ("joint", window, causal, query.shape, query.device), build)
        return joint

    def _once(self, mask: Any, site: Site, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return `build()`, called once per forward for each mask and `key`; most layers receive the same mask object."""
        # A layer at which some rows have no prefix does not share its result with other layers.
        key = (id(mask), site.index if self.prefixes[site.role].differs_at(site.index) else None, *key)
        if key not in self._masks:
            self._masks[key] = (mask, build())  # a stored mask is not freed, so its id stays unique
        return self._masks[key][1]

    def _is_causal(self, site: Site, function: str, kwargs: dict[str, Any]) -> bool:
        """Whether an attention function is causal if it is called without a mask.

        Eager attention is never causal. SDPA and flash attention use the call's `is_causal`, or else the module's. Any other
        function is assumed to be causal if the stack is.
        """
        if function.startswith("eager"):
            return False
        given = kwargs.get("is_causal")
        if given is None and (function == "sdpa_attention_forward" or function.startswith("flash")):
            given = getattr(site.module, "is_causal", True)
        return bool(self.stack.causal and site.role == "self" if given is None else given)

    def _visible(self, site: Site, window: int | None, query: Tensor) -> Tensor | None:
        """Return the virtual tokens that each query sees, [B or 1, 1, Q or 1, P] bool, or None for all.

        In layers that share keys (Gemma 4), the queries may be those of only the last Q of the T tokens.
        """
        prefix, device = self.prefixes[site.role], query.device
        if prefix.requests is not None:
            return prefix.requests.visible(site.index, window, self.positions, query.shape[2]).to(device)
        present = prefix.present(device, site.index)
        visible = None if present is None else present[:, None, None, :]
        # A windowed prefix is directly before the text: early tokens see the end of the prefix, and later tokens see none of it.
        if window is not None and prefix.windowed is not False and self.positions is not None:
            columns = torch.arange(prefix.length, device=device)
            distance = self.positions.to(device)[:, -query.shape[2] :, None] + prefix.length - columns
            near = (distance < window)[:, None]
            if isinstance(prefix.windowed, Tensor):
                near = near | ~prefix.windowed.to(device)[:, None, None, None]
            visible = near if visible is None else near & visible
        return visible

    def injected_tensors(self) -> list[Tensor]:
        """Return every key and value."""
        return [part for own in self.prefixes.values() for parts in (own.keys, own.values) for part in parts.values()]

    def detach_injected(self) -> None:
        """Replace every key and value with a leaf of the autograd graph."""
        for role, prefix in self.prefixes.items():
            keys = {index: self.leaf_of(tensor) for index, tensor in prefix.keys.items()}
            values = {index: self.leaf_of(tensor) for index, tensor in prefix.values.items()}
            self.prefixes[role] = replace(prefix, keys=keys, values=values)
