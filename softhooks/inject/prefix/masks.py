"""Add columns for a prefix to attention masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.paged_cache import paged_cache


def refuse_attention(name: str, kwargs: dict[str, Any], cut: bool = False, masked: bool = False) -> None:
    """Refuse attention functions whose mask cannot be extended to cover a prefix, such as flex attention.

    Args:
        name: the name of the attention function.
        kwargs: the keyword arguments of its call.
        cut: whether tokens see only a window of the text but the whole prefix; flash attention would apply the window to both.
        masked: whether the call has a mask.
    """
    flash = name.startswith("flash")
    packed = flash and any(kwargs.get(key) is not None for key in ("cu_seq_lens_q", "cu_seq_lens_k"))
    cut = flash and cut
    unmasked = not masked and ("paged" in name or paged_cache(kwargs) is not None)
    if "flex" in name or unmasked or packed or cut:
        function = name + (" with packed sequences" if packed else " with windows" if cut else "")
        raise UnsupportedModeError(
            f"the attention function {function} has no mask that can be extended to cover a key-value prefix.",
            "Use `model.set_attn_implementation('sdpa')` or 'eager'.",
        )


def widen_mask(
    mask: Any, length: int, visible: Tensor | None, causal: bool, query: Tensor, key: Tensor, function: str
) -> Any:
    """Add P columns for a prefix to a mask, before the text's K columns; return None if every query sees all keys.

    Args:
        mask: None; [B, K], for flash attention; or [B, 1 or H, T, K], bool (True: seen) or additive.
        length: the number of virtual tokens, P.
        visible: the virtual tokens that each query sees, [B or 1, 1, T or 1, P], or None for all.
        causal: whether, without a mask, each query sees only the keys up to its own position.
        query, key: the queries and keys of the text.
        function: the name of the attention function.
    """
    if function.startswith("flash"):
        if visible is not None:  # flash attention aligns the queries with the last keys, so each sees the whole prefix
            raise UnsupportedModeError(
                "some tokens must see only part of the prefix, but with flash attention every token sees all of it.",
                "Use `model.set_attn_implementation('sdpa')` for prompts of different lengths in one batch and for models "
                "with sliding windows.",
            )
        return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=-1)
    if mask is None and not causal and visible is None:
        return None
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        # The function's own causal masking would count the prefix's columns, so an explicit mask is needed.
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
