"""The parts of vLLM 0.32.0 that softhooks' connector uses, reduced to what the connector reads and writes.

`tests/serving_real/test_offline.py` checks that the connector implements the methods of vLLM's own class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VERSION = "0.32.0+cpu"


class Request:
    """A request in the scheduler."""

    def __init__(self, name: str, ids: list[int], prompt: object = None, salt: str | None = None) -> None:
        self.request_id = name
        self.kv_transfer_params = None if prompt is None else {"soft_prompt": prompt}
        self.prompt_token_ids = ids
        self._all_token_ids = list(ids)
        self.num_prompt_tokens = len(ids)
        self.cache_salt = salt
        self.block_hashes: list[Any] = [(None, *ids[:4])]

    def update_block_hashes(self) -> None:
        start = len(self.block_hashes) * 4
        for place in range(start, len(self._all_token_ids) - 3, 4):
            self.block_hashes.append((self.cache_salt, *self._all_token_ids[place : place + 4]))


@dataclass
class Block:
    block_id: int
    is_null: bool = False


def blocks(*groups: list[int | None]) -> Any:
    """A request's blocks in each group of layers; None for blocks that a sliding window has left."""
    return SimpleNamespace(
        blocks=tuple([Block(0, True) if number is None else Block(number) for number in group] for group in groups)
    )


class Implementation:
    """An attention back-end with its own layout: [blocks, Hk, size, 2 * D]."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        assert key.dtype == value.dtype == cache.dtype
        assert len(key) == len(value) == len(slots)
        size = cache.shape[2]
        for row, slot in enumerate(slots.tolist()):
            cache[slot // size, :, slot % size] = torch.cat([key[row], value[row]], dim=-1)


@dataclass
class Layer:
    heads: int
    dim: int
    size: int = 4
    count: int = 20
    dtype: torch.dtype = torch.float32
    impl: Implementation = field(default_factory=Implementation)

    def __post_init__(self) -> None:
        self.kv_cache = torch.full((self.count, self.heads, self.size, 2 * self.dim), 7.0, dtype=self.dtype)

    def read(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([self.kv_cache[slot // self.size, :, slot % self.size] for slot in slots])
        key, value = rows.chunk(2, dim=-1)
        return key, value


def configuration(prompts: object, **changes: Any) -> Any:
    """vLLM's configuration for the tiny Llama of `zoo`."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "layers": 2,
        "heads": 2,
        "dim": 8,
        "vocabulary": 96,
        "window": None,
        "max_model_len": 64,
        "context": 1,
        "pipeline": 1,
        "speculative": None,
        "cache_dtype": "auto",
        "policy": "fail",
        "runner": "generate",
        "overrides": {},
        "mla": False,
        "connector": "SoftPromptConnector",
        "extra": {"prompts": str(prompts)},
    } | changes
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(model_type=values["model_type"], vocab_size=values["vocabulary"]),
        use_mla=values["mla"],
        is_hybrid=False,
        runner_type=values["runner"],
        hf_overrides=values["overrides"],
        max_model_len=values["max_model_len"],
        get_total_num_hidden_layers=lambda: values["layers"],
        get_total_num_kv_heads=lambda: values["heads"],
        get_head_size=lambda: values["dim"],
        get_sliding_window=lambda: values["window"],
    )
    parallel = SimpleNamespace(
        decode_context_parallel_size=values["context"],
        prefill_context_parallel_size=1,
        pipeline_parallel_size=values["pipeline"],
        tensor_parallel_size=1,
    )
    transfer = SimpleNamespace(
        kv_connector=values["connector"],
        kv_connector_extra_config=values["extra"],
        kv_load_failure_policy=values["policy"],
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype=values["cache_dtype"]),
        speculative_config=values["speculative"],
        kv_transfer_config=transfer,
    )


class FullAttentionSpec:
    block_size = 4


class MambaSpec:
    block_size = 4


def cache_configuration(names: tuple[str, ...], spec: type = FullAttentionSpec) -> Any:
    """The groups of layers in vLLM's cache: one."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(names), kv_cache_spec=spec())])


class _Base:
    def __init__(self, config: Any, role: Any, cache_config: Any) -> None:
        self.metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self.metadata = metadata

    def _get_connector_metadata(self) -> Any:
        return self.metadata


@dataclass
class _Results:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class ValidationError(Exception):
    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSION) -> SimpleNamespace:
    """Put modules with vLLM's names in the place of vLLM; return the classes whose methods the connector wraps."""
    processor = type("InputProcessor", (), {"process_inputs": lambda self, request: request})
    engine = type("AsyncLLM", (), {"generate": lambda self, prompt, sampling_params, *rest, **more: "stream"})
    requests = {
        name: type(name, (), {"to_beam_search_params": lambda self: "beams"})
        for name in ("ChatCompletionRequest", "CompletionRequest")
    }
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": _Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": Enum("KVConnectorRole", ["SCHEDULER", "WORKER"]),
            "KVConnectorTransferResults": _Results,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        "vllm.entrypoints.openai.chat_completion.protocol": requests,
        "vllm.entrypoints.openai.completion.protocol": requests,
        "vllm.exceptions": {"VLLMValidationError": ValidationError},
        "vllm.v1.engine.async_llm": {"AsyncLLM": engine},
        "vllm.v1.engine.input_processor": {"InputProcessor": processor},
    }
    packages = {name.rsplit(".", end)[0] for name in contents for end in range(name.count(".") + 1)}
    for name in sorted(packages | set(contents)):
        module = ModuleType(name)
        vars(module).update({"__path__": [], **contents.get(name, {})})
        monkeypatch.setitem(sys.modules, name, module)
    connector = "softhooks.integrations._vllm_connector"
    monkeypatch.setitem(sys.modules, connector, ModuleType(connector))  # removed again after the test
    del sys.modules[connector]
    return SimpleNamespace(processor=processor, engine=engine, **requests)
