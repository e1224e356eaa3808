"""A key-value prefix at the attention function: the pass, and the masks that it needs.

The prefix never enters the model's cache, so static caches, cropped caches, returned caches and activation checkpointing see
what they would see without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction, function_name
from softhooks.backbone.stack import Role, Site, Stack
from softhooks.backbone.windows import require_one_chunk, window_of
from softhooks.errors import UnsupportedModeError
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.prefix.joint_rows import attend_jointly, joining_pays, joint_mask
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.paged_cache import PrefixedPagedCache, paged_cache
from softhooks.inject.prefix.recompute import recomputed

_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


class PrefixPass(CheckpointedPass):
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
        own = prefixes.get("self")
        require_one_chunk(stack, 0 if own is None or own.windowed is False else own.length, positions)
        self.prefixes = prefixes
        self.positions = positions
        self._masks: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        if training:
            self.follow_checkpointing()

    def enters(self, site: Site) -> bool:
        """Tell whether a site has a prefix."""
        return site.role in self.prefixes and site.index in self.prefixes[site.role].keys

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function over the prefix and the text."""
        if not self.enters(site):
            return attention(*args, **kwargs)
        self.touched = True
        prefix = self.prefixes[site.role]
        module, query, key, value, mask, *rest = args if len(args) > 4 else (*args, kwargs.pop("attention_mask", None))
        flash = function_name(attention).startswith("flash")  # knows, without a mask, which of the keys are text
        causal = mask is None and self._is_causal(site, function_name(attention), kwargs)
        if causal and not flash and key.shape[2] > query.shape[2] > 1:
            # An empty static cache: the keys behind the queries are blank, and no mask says so.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if site.role == "self" and joining_pays(function_name(attention), prefix, query, key, mask, kwargs):
            joined = self._joined_mask(site, module, query, mask, kwargs, causal)
            return attend_jointly(attention, prefix, site.index, (module, query, key, value, joined, *rest), kwargs)
        mask = self._mask(site, attention, module, query, key, mask, kwargs, causal)
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

    def _mask(
        self,
        site: Site,
        attention: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: Any,
        causal: bool,
    ) -> Any:
        """Widen the mask over the prefix; equal for all layers with one window, so built once a forward."""
        name = function_name(attention)
        window = window_of(site, kwargs) if site.role == "self" else None
        everywhere = not self.stack.causal or self.prefixes[site.role].windowed is False
        refuse_attention(name, kwargs, cut=window is not None and everywhere, masked=isinstance(mask, Tensor))
        window = window if self.stack.causal else None  # around a token, a window is the mask's alone
        causal = causal and query.shape[2] > 1

        def build() -> Any:
            visible = self._visible(site, window, query)
            return widen_mask(mask, self.prefixes[site.role].length, visible, causal, query, key, name)

        if torch.compiler.is_compiling():
            return build()
        bare = site.index if site.index in self.prefixes[site.role].bare else None
        shape = (query.shape[2], key.shape[2])
        place = (site.role, bare, window, causal, id(mask), name, query.dtype, query.device, shape)
        if place not in self._masks:
            self._masks[place] = (mask, build())  # the old mask is kept too: its id must not be used again
        return self._masks[place][1]

    def _joined_mask(
        self, site: Site, module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any], causal: bool
    ) -> Tensor:
        """The mask of rows joined behind one prefix; built once a forward, as the widened one."""
        window = window_of(site, kwargs) if self.stack.causal else None
        causal = causal and query.shape[2] > 1
        bare = site.index if site.index in self.prefixes[site.role].bare else None
        place = ("joined", bare, window, causal, id(mask), query.shape, query.device)
        if place not in self._masks:
            visible = self._visible(site, window, query)
            self._masks[place] = (mask, joint_mask(mask, visible, self.prefixes[site.role], query, causal))
        joined: Tensor = self._masks[place][1]
        return joined

    def _is_causal(self, site: Site, function: str, kwargs: dict[str, Any]) -> bool:
        """Whether this function, called without a mask, lets a query see the keys up to its own only.

        Eager attention shows every query every key. SDPA and flash attention ask the call, then the module. Of a function that
        nobody here knows only the effect is known: whether the stack was causal when it was probed.
        """
        if function.startswith("eager"):
            return False
        given = kwargs.get("is_causal")
        if given is None and (function == "sdpa_attention_forward" or function.startswith("flash")):
            given = getattr(site.module, "is_causal", True)
        return bool(self.stack.causal and site.role == "self" if given is None else given)

    def _visible(self, site: Site, window: int | None, query: Tensor) -> Tensor | None:
        """Which virtual tokens each query sees, [B or 1, 1, Q or 1, P] bool; None: all of them.

        Layers that share keys (Gemma 4) may be asked for the last Q of the T columns alone.
        """
        prefix, device = self.prefixes[site.role], query.device
        present = prefix.present(device, site.index)
        visible = None if present is None else present[:, None, None, :]
        if window is not None and prefix.windowed is not False and self.positions is not None:
            columns = torch.arange(prefix.length, device=device)
            distance = self.positions.to(device)[:, -query.shape[2] :, None] + prefix.length - columns
            near = (distance < window)[:, None]
            if isinstance(prefix.windowed, Tensor):
                near = near | ~prefix.windowed.to(device)[:, None, None, None]
            visible = near if visible is None else near & visible
        return visible

    def injected(self) -> list[Tensor]:
        """Every key and value."""
        return [part for own in self.prefixes.values() for parts in (own.keys, own.values) for part in parts.values()]

    def detach_injected(self) -> None:
        """Cut every key and value off from the prompt's graph."""
        for role, prefix in self.prefixes.items():
            keys = {index: self.cut_off(tensor) for index, tensor in prefix.keys.items()}
            values = {index: self.cut_off(tensor) for index, tensor in prefix.values.items()}
            self.prefixes[role] = replace(prefix, keys=keys, values=values)


def refuse_attention(name: str, kwargs: dict[str, Any], cut: bool = False, masked: bool = False) -> None:
    """Refuse the attention functions whose masks a prefix cannot be written into.

    Args:
        cut: whether tokens see a window of tokens and yet the whole prefix; flash attention would window the prefix too.
        masked: whether a mask comes with the call.

    Raises:
        UnsupportedModeError: for flex attention, for paged attention without a mask, and for flash attention where it is packed
            or would cut the prefix.
    """
    flash = name.startswith("flash")
    packed = flash and any(kwargs.get(key) is not None for key in _PACKED_ARGUMENTS)
    cut = flash and cut
    unmasked = not masked and ("paged" in name or paged_cache(kwargs) is not None)
    if "flex" in name or unmasked or packed or cut:
        raise UnsupportedModeError(
            "a key-value prefix needs an attention function whose mask it can widen.",
            "Use `model.set_attn_implementation('sdpa')` or 'eager'.",
            function=name + (" with packed sequences" if packed else " with windows" if cut else ""),
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
            "flash attention shows every query the whole prefix.",
            "Use `model.set_attn_implementation('sdpa')` for prompts of different lengths in one batch and for models "
            "with sliding windows.",
            asked="a prefix that some queries do not see",
        )
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=-1)
