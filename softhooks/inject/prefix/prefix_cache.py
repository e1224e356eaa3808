"""Caches that put a prefix before the keys and values of a layer.

GPT-J, BLOOM, Falcon and similar models do not use the attention interface. They pass their keys and values to `cache.update` and
attend to its result, so this is where a prefix can be added without changing their attention code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from softhooks.backbone.recording_cache import RecordingCache
from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.prefix_after_padding import KeyOrder


class PrefixCache(Cache):
    """A read-only prefix before the caller's cache, or before only the text if there is no cache.

    Only the text's keys and values go to the caller's cache, and the prefix is put before the result. The caller's cache
    therefore never contains a virtual token, and a recomputed layer reads the same keys again.

    Args:
        prefix: keys and values by layer.
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
                f"{type(inner).__name__} has sliding layers; a prefix that enters through a cache needs a full-length cache.",
                "Generate with the default cache of full length.",
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update the caller's cache, and return its keys and values with the layer's prefix before them, [B, Hk, P + K, D]."""
        self.has_injected = True
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prefix.keys:
            return key_states, value_states
        key, value = self.prefix.before(layer_idx, key_states, value_states)
        return (key, value) if self.order is None else (self.order.arrange(key, 2), self.order.arrange(value, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the prefix and the caller's cache together."""
        return self.prefix.length + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the offset of the queries, which come after the prefix and the cached tokens."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, including the prefix, and their offset."""
        if self.inner is None:
            return self.prefix.length + query_length, 0
        length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return self.prefix.length + length, offset


class PrefixPair(EncoderDecoderCache):
    """A prefix in the self-attention of a decoder that also attends to an encoder; cross-attention has no prefix.

    Args:
        prefixed: the cache of self-attention.
        inner: the caller's cache. The cross-attention part of an `EncoderDecoderCache` is used and filled; with any other cache,
            the keys of cross-attention are computed from the encoder's states in each forward.
    """

    def __init__(self, prefixed: PrefixCache, inner: Cache | None) -> None:
        own = inner if isinstance(inner, EncoderDecoderCache) else None
        super().__init__(prefixed, RecordingCache() if own is None else own.cross_attention_cache)
        self.is_updated = _Never() if own is None else own.is_updated

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse a model that reads keys from `layers` instead of calling `update`.

        It is then unknown whether the keys belong to self-attention or cross-attention.

        Raises:
            UnsupportedModeError: always.
        """
        raise UnsupportedModeError(
            "the model reads `past_key_values.layers`, but with a prefix that enters through a cache its layers must "
            "keep the keys of an encoder apart from their own.",
            "Use a prompt that enters as embeddings, such as PromptTuning.",
        )


class _Never(dict[int, bool]):
    """The `is_updated` flags of a cache without cross-attention keys; always empty."""

    def __setitem__(self, _layer: int, _is_there: bool) -> None:
        return None
