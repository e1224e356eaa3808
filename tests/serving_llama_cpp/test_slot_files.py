"""The files in `tests/serving/slots/` are what the server writes. To write them again: SOFTHOOKS_RECORD=1 make test-llama-cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from gguf_models import VOCABULARY
from server import serving
from tiny_llama import tiny_llama

from softhooks.errors import CheckpointError
from softhooks.serving.llama_server import LlamaServer
from softhooks.serving.slot_file import read_slot_file

RECORDED = Path(__file__).parents[1] / "serving" / "slots"
TOKENS = [5, 70, 33]
OPTIONS: dict[str, dict[str, Any]] = {
    "f32-transposed": {},
    "f16-flash-3-slots": {"slots": 3, "cache": "f16", "flash": "enabled"},
    "bf16-flash-unified": {"slots": 2, "unified": True, "cache": "bf16", "flash": "enabled"},
    "q8_0-flash": {"cache": "q8_0", "flash": "enabled"},
    "f32-sliding-window": {},
}


def model(name: str) -> Any:
    if name != "f32-sliding-window":
        return tiny_llama()
    sizes = tiny_llama().config.to_diff_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept = {option: sizes[option] for option in (*names, "num_key_value_heads", "head_dim", "max_position_embeddings")}
    layers = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(**kept, sliding_window=64, layer_types=layers, tie_word_embeddings=True)
    return tf.Gemma3ForCausalLM(config).float().eval()


def shape(path: Path) -> Any:
    """Where a file has its keys and values, or why it is refused."""
    try:
        found = read_slot_file(path)
    except CheckpointError as error:
        return str(error).replace(str(path), "")
    return found.tokens, found.keys, found.values


@pytest.mark.parametrize("name", OPTIONS)
def test_the_server_writes_the_recorded_file(name: str, tmp_path: Path) -> None:
    assert tiny_llama().config.vocab_size == VOCABULARY
    recorded, slot = RECORDED / f"{name}.bin", min(1, OPTIONS[name].get("slots", 1) - 1)
    with serving(model(name), tmp_path / "server", **OPTIONS[name]) as running:
        server = LlamaServer(running.url)
        server.fill(slot, TOKENS)
        server.save(slot, "a.bin")
        content = (running.slots / "a.bin").read_bytes()
    if os.environ.get("SOFTHOOKS_RECORD"):
        recorded.write_bytes(content)
    (tmp_path / "a.bin").write_bytes(content)
    assert shape(tmp_path / "a.bin") == shape(recorded)
    assert len(content) == len(recorded.read_bytes())
