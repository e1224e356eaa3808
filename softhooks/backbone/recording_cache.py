"""A cache that records the keys and values passed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class RecordingCache(Cache):
    """A cache without past tokens that records the keys and values of each layer.

    Args:
        running: returns the running module, to fill `callers`.

    Attributes:
        recorded: keys and values by layer, each [B, Hk, T, D].
        callers: the module that called the cache, by layer.
    """

    def __init__(self, running: Callable[[], nn.Module] | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self.callers: dict[int, nn.Module] = {}
        self._running = running

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Any:
        """Record and return the keys and values of a layer."""
        self.recorded[layer_idx] = (key_states, value_states)
        if self._running is not None:
            self.callers[layer_idx] = self._running()
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, because there are no past tokens."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys, which equals the number of queries, and their offset, 0."""
        return query_length, 0
