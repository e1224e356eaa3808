"""Caches for models that do not use the attention interface: one that listens, one that puts a prefix in.

GPT-J, BLOOM, Falcon and their like hand their keys and values to `cache.update` and attend to what it returns. That is the one
place where keys and values can be read, or be put in front, without touching the attention code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from softhooks.backbone.listening_cache import ListeningCache
from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.left_padding import KeyOrder


class PrefixCache(Cache):
    """A read-only prefix in front of the caller's own cache, or of none.

    What the model computes goes to the caller's cache alone; the prefix is put in front of what comes back. So the caller's
    cache never holds a virtual token, and a layer that is recomputed reads the same keys twice.

    Args:
        prefix: keys and values by layer.
        inner: the caller's cache.
        behind: the order of keys, where rows begin with padding.
    """

    def __init__(self, prefix: KeyValues, inner: Cache | None, behind: KeyOrder | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.prefix = prefix
        self.behind = behind
        self.inner = inner
        self.touched = False
        if inner is not None and any(getattr(layer, "is_sliding", False) for layer in inner.layers):
            raise UnsupportedModeError(
                "a prefix that enters through a cache cannot stand before a sliding cache.",
                "Generate with the default cache of full length.",
                cache=type(inner).__name__,
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store what came in with the caller, and return it behind the layer's prefix, if it has one: [B, Hk, P + K, D]."""
        self.touched = True
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.prefix.keys:
            return key_states, value_states
        key, value = self.prefix.before(layer_idx, key_states, value_states)
        return (key, value) if self.behind is None else (self.behind.arrange(key, 2), self.behind.arrange(value, 2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The prefix is past, and so is what the caller's cache holds."""
        return self.prefix.length + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Queries stand behind the prefix and the caller's tokens."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys are the prefix's and the caller's."""
        if self.inner is None:
            return self.prefix.length + query_length, 0
        length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        return self.prefix.length + length, offset


class PrefixPair(EncoderDecoderCache):
    """A prefix before the keys of self-attention, in a decoder that attends to an encoder too; cross-attention has no prefix.

    Args:
        prefixed: the cache of self-attention.
        inner: the caller's; what it has for cross-attention is used and filled. Any other keeps nothing of cross-attention, whose
            keys are then made of the encoder's states in each forward.
    """

    def __init__(self, prefixed: PrefixCache, inner: Cache | None) -> None:
        own = inner if isinstance(inner, EncoderDecoderCache) else None
        super().__init__(prefixed, ListeningCache() if own is None else own.cross_attention_cache)
        self.is_updated = _Never() if own is None else own.is_updated

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """Refuse a model that reads keys out of the cache by itself, past `update`, and knows of one kind of keys only.

        Raises:
            UnsupportedModeError: always.
        """
        raise UnsupportedModeError(
            "a prefix that enters through a cache needs layers that keep the keys of an encoder apart from their own.",
            "Use a prompt that enters as embeddings, such as PromptTuning.",
            asked="`past_key_values.layers`, of a cache with the keys of an encoder",
        )


class _Never(dict[int, bool]):
    """Notes of which layers have keys for cross-attention, where none are kept."""

    def __setitem__(self, _layer: int, _is_there: bool) -> None:
        return None
