"""Write tiny models of transformers as GGUF files in float32, with a tokenizer whose tokens are single characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

CHARACTERS = [chr(code) for code in range(ord(" "), ord("~") + 1)]
BOS, EOS, PAD = (len(CHARACTERS) + place for place in range(3))
VOCABULARY = len(CHARACTERS) + 3

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_PERMUTED = ("llama", "mistral", "granite")
"""The types whose queries and keys llama.cpp's converter stores in another order."""


def token_ids(text: str) -> list[int]:
    """The tokens of a text: the first token, and one token for each character."""
    return [BOS, *map(CHARACTERS.index, text)]


def write_gguf(model: Any, path: Path) -> None:
    """Write a model as llama.cpp's `convert_hf_to_gguf.py` does."""
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[kind]])
    _write_config(writer, config)
    _write_tokenizer(writer)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[kind], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float()
        if kind in _PERMUTED and ".q_proj." in name:
            value = _permuted(value, config.num_attention_heads)
        elif kind in _PERMUTED and ".k_proj." in name:
            value = _permuted(value, config.num_key_value_heads)
        elif kind == "gemma3_text" and name.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value.numpy().astype(np.float32))
    if getattr(config, "rope_parameters", {}).get("rope_type") == "llama3":
        size = config.head_dim
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from two halves to pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    kinds = [gguf.TokenType.NORMAL] * len(CHARACTERS) + [gguf.TokenType.CONTROL] * 3
    writer.add_token_list(["\u0120", *CHARACTERS[1:], "<s>", "</s>", "<pad>"])  # U+0120 is GPT-2's name of the space
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u0122 \u0122"])  # of characters that are not in the vocabulary
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
