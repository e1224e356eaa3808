"""Attention masks with columns for a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.paged_cache import paged_cache

_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


def refuse_attention(name: str, kwargs: dict[str, Any], cut: bool = False, masked: bool = False) -> None:
    """Refuse attention functions whose mask cannot be widened over a prefix.

    Args:
        name: of the attention function.
        kwargs: its arguments.
        cut: whether tokens see a window of tokens but the whole prefix; flash attention would apply the window to the prefix too.
        masked: whether the call has a mask.

    Raises:
        UnsupportedModeError: for flex attention, for paged attention without a mask, and for flash attention where it is packed
            or would cut the prefix.
    """
    flash = name.startswith("flash")
    packed = flash and any(kwargs.get(key) is not None for key in _PACKED_ARGUMENTS)
    cut = flash and cut
    unmasked = not masked and ("paged" in name or paged_cache(kwargs) is not None)
    if "flex" in name or unmasked or packed or cut:
        function = name + (" with packed sequences" if packed else " with windows" if cut else "")
        raise UnsupportedModeError(
            f"{function} has no mask that can be widened over a key-value prefix.",
            "Use `model.set_attn_implementation('sdpa')` or 'eager'.",
            function=function,
        )


def widen_mask(
    mask: Any, length: int, visible: Tensor | None, causal: bool, query: Tensor, key: Tensor, function: str
) -> Any:
    """Add the prefix's columns to a mask, before those of the text.

    Args:
        mask: None; [B, K] (flash); or [B, 1 or H, T, K], bool (True: seen) or additive.
        length: P.
        visible: which virtual tokens each query sees, [B or 1, 1, T or 1, P]; None: all.
        causal: whether a mask of None means that each query sees the keys up to its own.
        query, key: of the text alone; their shapes, precision and device are used.
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
        # The function's own causal masking would count the prefix's columns, so the mask is written out.
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
    """Widen the [B, K] mask of flash attention, which aligns its own causal mask with the last key: a prefix is seen by all."""
    if visible is not None:
        raise UnsupportedModeError(
            "some queries must not see the whole prefix, but flash attention shows every query the whole prefix.",
            "Use `model.set_attn_implementation('sdpa')` for prompts of different lengths in one batch and for models "
            "with sliding windows.",
        )
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=-1)
