"""The part of the KV connector that runs in vLLM's workers: it writes prefixes to the cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softhooks.integration_support.serving import Prefix
from softhooks.integrations._vllm_plan import Step, Write

Pair = tuple[Tensor, Tensor]


class PrefixWorker:
    """Keep prefixes in the memory of a worker's device, and write them to the cache.

    Args:
        groups: the names of the attention layers in each group of layers.
        rank, size: the worker's rank and the number of workers that share the heads (tensor parallelism).
    """

    def __init__(self, groups: list[list[str]], rank: int = 0, size: int = 1) -> None:
        self.groups = groups
        self.rank = rank
        self.size = size
        self.prefixes: dict[str, dict[str, Pair]] = {}
        self.failed: list[str] = []

    @torch.no_grad()
    def run(self, step: Step, layers: Mapping[str, Any]) -> None:
        """Take up new prefixes, drop old ones, and write the prefixes of new requests into the cache.

        Args:
            layers: vLLM's attention layers by name.
        """
        for digest in step.dropped:
            self.prefixes.pop(digest, None)
        for digest, prefix in step.added.items():
            self.prefixes[digest] = self._own_part(prefix, layers)
        for write in step.writes:
            self._write(write, layers)
        self.failed += step.failed

    def take_failed(self) -> set[str]:
        """Return the ids of the requests that cannot be served, once."""
        failed, self.failed = self.failed, []
        return set(failed)

    def _own_part(self, prefix: Prefix, layers: Mapping[str, Any]) -> dict[str, Pair]:
        """Copy the keys and values of this worker's heads to the device, as a pair for each layer's name."""
        parts: dict[str, Pair] = {}
        for name in (name for group in self.groups for name in group):
            cache, index = layers[name].kv_cache, layer_index(name)
            heads = heads_of_rank(prefix.facts.heads[index], self.rank, self.size)
            key, value = (tensors[index][:, heads].to(cache).contiguous() for tensors in (prefix.keys, prefix.values))
            parts[name] = key, value
        return parts

    def _write(self, write: Write, layers: Mapping[str, Any]) -> None:
        parts = self.prefixes[write.digest]
        device = next(iter(parts.values()))[0].device
        for group, slots in zip(self.groups, write.slots, strict=True):
            kept = [(write.start + offset, slot) for offset, slot in enumerate(slots) if slot >= 0]
            if not kept:
                continue
            positions, places = (torch.tensor(column, device=device) for column in zip(*kept, strict=True))
            for name in group:
                layer, (key, value) = layers[name], parts[name]
                # The layer's own function writes in the layout of its attention back-end.
                layer.impl.do_kv_cache_update(layer, key[positions], value[positions], layer.kv_cache, places)


def heads_of_rank(heads: int, rank: int, size: int) -> slice:
    """Return which of the model's key-value heads a worker has; if there are more workers than heads, workers share a head."""
    own = max(heads // size, 1)
    start = rank * heads // size
    return slice(start, start + own)


def layer_index(name: str) -> int:
    """Return the index in the name of an attention layer, such as 3 of `model.layers.3.self_attn.attn`."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    if len(numbers) != 1:
        raise ValueError(f"the name of the attention layer {name!r} has {len(numbers)} numbers; it must have one.")
    return int(numbers[0])
