"""Caches that put a prefix before the keys and values of a layer.

GPT-J, BLOOM, Falcon and similar models do not use the attention interface. They pass their keys and values to `cache.update` and
attend to the keys and values that it returns. So a cache can add a prefix without a change to their attention code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from softhooks.backbone.recording_cache import RecordingCache
from softhooks.compat.cache_argument import CACHE
from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.layout.slot_map import gather_columns


@dataclass(frozen=True)
class KeyOrder:
    """The order of keys in rows that start with padding: padding, prefix, text.

    If a layer computes biases or windows from the indices of the keys, the prefix must be directly before the text.

    Attributes:
        order: for each key of the result, its index in the concatenation of prefix and padded text, [B, P + K].
        text: for each token of the padded text, its index in the result, [B, K].
    """

    order: Tensor
    text: Tensor

    def arrange(self, tensor: Tensor, dim: int) -> Tensor:
        """Reorder the columns of a concatenation of prefix and padded text. [B, ..., P + K, ...] -> [B, ..., P + K, ...]."""
        return gather_columns(tensor, self.order, dim)

    def own(self, tensor: Tensor) -> Tensor:
        """Select the padded text's columns from the last dimension. [B * n, ..., P + K] -> [B * n, ..., K]."""
        batch = self.text.shape[0]
        if tensor.shape[0] % batch:
            tensor = tensor.expand(batch, *tensor.shape[1:])
        rows = tensor.reshape(batch, -1, tensor.shape[-1])
        return gather_columns(rows, self.text, 2).reshape(*tensor.shape[:-1], -1)


def key_order(mask: Tensor | None, length: int) -> KeyOrder | None:
    """Return the order of keys for `length` virtual tokens and a text's mask, [B, K]; None if no row starts with padding."""
    if mask is None or mask.dim() != 2 or bool(mask[:, 0].all()):
        return None
    lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    places = torch.arange(length + mask.shape[1], device=mask.device)[None]
    # Column p of the result is padding (from p + P) for p < lead, then the prefix (from p - lead), then the text (from p).
    prefix = torch.where(places < lead + length, places - lead, places)
    columns = torch.arange(mask.shape[1], device=mask.device)[None]
    return KeyOrder(
        order=torch.where(places < lead, places + length, prefix),
        text=torch.where(columns < lead, columns, columns + length),
    )


class PrefixCache(Cache):
    """A cache that returns a prefix before the keys and values of the caller's cache, or of the text if there is no cache.

    The prefix is never written to the caller's cache, and a layer that activation checkpointing recomputes reads the
    same keys again.

    Args:
        inner: the caller's cache.
        order: the order of keys, if rows start with padding.
    """

    def __init__(self, prefix: KeyValues, inner: Cache | None, order: KeyOrder | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.prefix = prefix
        self.order = order
        self.inner = inner
        self.has_injected = False
        if inner is not None and any(getattr(layer, "is_sliding", False) for layer in inner.layers):
            raise UnsupportedModeError(
                f"{type(inner).__name__} has layers that drop old tokens (sliding windows); a prefix that enters through a cache "
                "needs one that keeps all tokens.",
                f"Pass `{CACHE}=DynamicCache()`, without a config: its layers keep all tokens.",
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update the caller's cache; return the layer's prefix followed by its keys and values, [B, Hk, P + K, D] each."""
        self.has_injected = True
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prefix.keys:
            return key_states, value_states
        key, value = self.prefix.before(layer_idx, key_states, value_states)
        return (key, value) if self.order is None else (self.order.arrange(key, 2), self.order.arrange(value, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the prefix and of the caller's cache together."""
        return self.prefix.length + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    get_query_offset = get_seq_length  # the queries come after all these keys

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, including the prefix, and their offset."""
        if self.inner is None:
            return self.prefix.length + query_length, 0
        length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return self.prefix.length + length, offset


class PrefixPair(EncoderDecoderCache):
    """A cache for a decoder that attends to an encoder, with a prefix in self-attention only.

    Args:
        prefixed: the cache of self-attention.
        inner: the caller's cache. If it is an `EncoderDecoderCache`, its cross-attention part is used and filled. Otherwise each
            forward computes the keys and values of cross-attention from the encoder's states.
    """

    def __init__(self, prefixed: PrefixCache, inner: Cache | None) -> None:
        own = inner if isinstance(inner, EncoderDecoderCache) else None
        super().__init__(prefixed, RecordingCache() if own is None else own.cross_attention_cache)
        self.is_updated = _Never() if own is None else own.is_updated

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse a model that reads `layers`: whether it needs those of self-attention or of cross-attention is unknown."""
        raise UnsupportedModeError(
            f"the model reads `{CACHE}.layers`; with a prefix that enters through a cache, it must get its keys from "
            f"`{CACHE}.update`.",
            "Use a prompt that enters as embeddings, such as PromptTuning.",
        )


class _Never(dict[int, bool]):
    """The `is_updated` flags of a cache without cross-attention keys; always empty."""

    def __setitem__(self, _layer: int, _is_there: bool) -> None:
        return None
