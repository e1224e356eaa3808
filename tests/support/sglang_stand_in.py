"""The parts of SGLang 0.5.23 that softhooks' prompt cache uses, reduced to what it reads and writes.

`make test-sglang` runs SGLang itself.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VERSION = "0.5.23"


@dataclass
class RadixKey:
    token_ids: array[int]
    extra_key: str | None = None
    cache_salt: str | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class InsertParams:
    key: RadixKey
    value: torch.Tensor


@dataclass
class MatchPrefixParams:
    key: RadixKey


class MHATokenToKVPool:
    """A pool of keys and values: for each layer [slots, heads, dim]."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, layers: int = 2, heads: int = 2, dim: int = 8, size: int = 40) -> None:
        self.keys, self.values = (torch.zeros(layers, size + 1, heads, dim) for _ in range(2))

    def set_kv_buffer(self, layer: None, slots: Any, key: Any, value: Any, *, layer_id_override: int) -> None:
        assert key.dtype == value.dtype == self.dtype
        self.keys[layer_id_override, slots], self.values[layer_id_override, slots] = key, value


class Allocator:
    def __init__(self, pool: MHATokenToKVPool) -> None:
        self.pool = pool
        self.clear()

    def clear(self) -> None:
        self.free = list(range(1, self.pool.keys.shape[1]))

    def available_size(self) -> int:
        return len(self.free)

    def alloc(self, count: int) -> torch.Tensor | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken)

    def get_kvcache(self) -> MHATokenToKVPool:
        return self.pool


class UnifiedRadixCache:
    """Entries by salt; a match is as long as the entry."""

    def __init__(self, params: Any) -> None:
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.reset()

    def reset(self) -> None:
        self.entries: dict[str | None, tuple[list[int], torch.Tensor]] = {}
        self.locked: list[Any] = []

    def insert(self, params: InsertParams) -> None:
        self.entries[params.key.cache_salt] = list(params.key.token_ids), params.value

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        ids, _ = self.entries.get(params.key.cache_salt, ([], None))
        common = 0
        while common < min(len(ids), len(params.key)) and ids[common] == params.key.token_ids[common]:
            common += 1
        return SimpleNamespace(device_prefix_len=common, last_device_node=(params.key.cache_salt, common))

    def lock(self, node: Any) -> Any:
        self.locked.append(node)
        return node


@dataclass
class Registered:
    backends: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)
    backend: str | None = "softhooks"


def options(**changes: Any) -> Any:
    """SGLang's resolved arguments, with default values."""
    values: dict[str, Any] = {
        "disable_radix_cache": False, "page_size": 1, "kv_cache_dtype": "auto", "tp_size": 1, "pp_size": 1, "dp_size": 1,
        "attn_cp_size": 1, "dcp_size": 1, "tokenizer_worker_num": 1, "speculative_algorithm": None, "dllm_algorithm": None,
        "disaggregation_mode": "null", "enable_hierarchical_cache": False, "enable_lmcache": False,
        "enable_unified_cache_external_linker": False, "enable_session_radix_cache": False, "enable_streaming_session": False,
        "json_model_override_args": "{}",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def model(**changes: Any) -> Any:
    """SGLang's configuration of the tiny Llama."""
    kind, window = changes.pop("model_type", "llama"), changes.pop("sliding_window", None)
    vocabulary = changes.pop("vocab_size", 96)
    text = SimpleNamespace(model_type=kind, vocab_size=vocabulary, sliding_window=window)
    values: dict[str, Any] = {"hf_text_config": text, "num_hidden_layers": 2, "head_dim": 8, "context_len": 64}
    heads = changes.pop("heads", 2)
    return SimpleNamespace(**{**values, **changes}, get_total_num_kv_heads=lambda: heads)


def context(pool: MHATokenToKVPool | None = None, hybrid: bool = False, served: Any = None, **changes: Any) -> Any:
    """What SGLang gives to the function that creates a cache."""
    params = SimpleNamespace(token_to_kv_pool_allocator=Allocator(pool or MHATokenToKVPool()))
    return SimpleNamespace(
        params=params, model_config=served or model(), server_args=options(**changes), is_hybrid_swa=hybrid
    )


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSION) -> Registered:
    """Put the stand-in in the place of SGLang."""
    made = Registered()
    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt.arg_groups.overrides": {"resolving_view": lambda given: given},
        "sglang.srt.mem_cache.base_prefix_cache": {"InsertParams": InsertParams, "MatchPrefixParams": MatchPrefixParams},
        "sglang.srt.mem_cache.common": {"evict_from_tree_cache": lambda _cache, _count: None},
        "sglang.srt.mem_cache.radix_cache": {"RadixKey": RadixKey},
        "sglang.srt.mem_cache.registry": {
            "create_unified_radix_cache": lambda given, cache_class: cache_class(given.params),
            "register_radix_cache_backend": made.backends.__setitem__,
        },
        "sglang.srt.mem_cache.unified_radix_cache": {"UnifiedRadixCache": UnifiedRadixCache},
        "sglang.srt.plugins.hook_registry": {
            "HookRegistry": SimpleNamespace(register=lambda target, hook, kind: made.hooks.update({target: (hook, kind)})),
            "HookType": SimpleNamespace(AROUND="around"),
        },
        "sglang.srt.runtime_context": {"get_memory": lambda: SimpleNamespace(radix_cache_backend=made.backend)},
    }  # fmt: skip
    for name in {".".join(full.split(".")[:end]) for full in contents for end in range(1, full.count(".") + 2)}:
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "softhooks.integrations._sglang_cache", raising=False)
    return made
