"""A cache that records the keys and values that a model's layers compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class ListeningCache(Cache):
    """A cache that keeps nothing of its own: it notes the keys and values of each layer and hands them back.

    Args:
        running: tells which module is running, to note who hands them over.
    """

    def __init__(self, running: Callable[[], nn.Module] | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        self.callers: dict[int, nn.Module] = {}
        self._running = running

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Any:
        """Note and return what came in, [B, Hk, T, D] each."""
        self.heard[layer_idx] = (key_states, value_states)
        if self._running is not None:
            self.callers[layer_idx] = self._running()
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is past."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys are as many as queries."""
        return query_length, 0
