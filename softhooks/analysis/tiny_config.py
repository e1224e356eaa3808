"""Tiny models of any architecture in transformers, from a class of configs or from the config of a real model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 160
PAD, BOS, EOS = 0, 1, 2

_SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size", "n_vocab"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "max_seq_length"),
    64: ("original_max_position_embeddings", "max_entity_position_embeddings"),
    48: (
        "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim",
        "ffn_dim", "ffn_hidden_size", "shared_intermediate_size", "dim_ff", "dff", "d_ff", "n_inner", "hidden_dim",
        "intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size", "d_inner", "mlp_dim",
        "shared_experts_intermediate_size", "inner_dim", "feed_forward_size", "encoder_intermediate_size",
    ),
    32: (
        "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "attention_hidden_size", "backbone_hidden_size",
        "true_hidden_size", "lru_width", "d_embed",
    ),
    16: (
        "embedding_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input", "image_size",
        "input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "intra_bottleneck_size", "laurel_rank",
        "gated_norm_rank", "entity_emb_size",
    ),
    8: (
        "head_dim", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "d_kv", "swa_head_dim", "attention_head_dim",
        "kv_channels", "global_head_dim", "d_head", "dim_head", "query_pre_attn_scalar", "moe_num_experts_", "index_head_dim",
        "entity_vocab_size", "image_seq_length", "mm_tokens_per_image", "linear_key_head_dim", "linear_value_head_dim",
        "linear_head_dim", "patch_size", "mamba_d_head", "v_channels", "qk_channels",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "rotary_dim", "moe_num_experts", "index_n_heads",
        "linear_num_value_heads", "linear_num_heads", "swa_num_attention_heads", "mamba_dt_rank", "time_step_rank",
        "local_attention", "number_of_experts", "temporal_patch_size_",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
        "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "linear_num_key_heads", "swa_num_key_value_heads",
        "moe_topk", "num_layers_per_stack", "num_hidden_groups_", "depth", "layers",
    ),
    12: ("sliding_window", "sliding_window_size", "attention_window_", "local_attention_window_len", "index_topk"),
}  # fmt: skip
_BY_NAME: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names}
_BY_NAME |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "cls_token_id": BOS, "sep_token_id": EOS}
_BY_NAME |= {"decoder_start_token_id": PAD, "forced_eos_token_id": None, "mask_token_id": 3}
_BY_NAME |= {
    "max_window_layers": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "topk_group": 1,
    "n_group": 1,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "n_head": 4, "d_head": 8, "d_inner": 48, "num_decoder_layers": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_key_value_heads": 4, "num_hidden_layers": ...},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 64, "input_size": 32},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": [8, 8]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mpnet": {"pad_token_id": 1},
    "nystromformer": {"num_landmarks": 128, "segment_means_seq_len": 128},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "hc_lowrank": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 32,
        "indexer_compress_ratio": 2,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "splinter": {"question_token_id": 5},
    "t5": {"decoder_start_token_id": PAD},
    "squeezebert": {"embedding_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""Config options that sizes alone do not determine: layer types, and options that depend on each other; `...` is the default."""


def shrunk(config_class: type, **changes: Any) -> dict[str, Any]:
    """Return the arguments that make a small config of a class; configs inside are made small too."""
    known = {name for cls in config_class.__mro__ for name in vars(cls).get("__annotations__", {})}
    known |= set(inspect.signature(config_class).parameters)
    small = {name: value for name, value in _BY_NAME.items() if name in known}
    if "qk_rope_head_dim" in small:  # latent attention: the head's size follows from its parts
        small.pop("head_dim", None)
        small["num_key_value_heads"] = small["num_attention_heads"]
    inner_configs = getattr(config_class, "sub_configs", {})
    default = config_class() if inner_configs else None
    for name in inner_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            own = CHANGES.get(inner.model_type, {})
            small[name] = shrunk(type(inner), **own) | {"model_type": inner.model_type}
    return {name: value for name, value in (small | changes).items() if value is not ...}


@torch.no_grad()
def widen(model: nn.Module) -> None:
    """Draw every matrix anew with large values; keep one-dimensional parameters, which are scales of norms and recurrences."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            parameter.normal_(std=0.4 if "embed" in name or "wte" in name else 0.15)


def tiny_like(config: Any) -> Any:
    """Return a small config of the same kind as the config of a real model.

    Flags, names (such as the activation), kinds of layers, and what is set to None are those of the real config. All sizes, and
    the ids of special tokens, are small.
    """
    cls = type(config)
    fixed = CHANGES.get(config.model_type, {})
    small = shrunk(cls, **fixed)
    inner = {name: getattr(config, name, None) for name in getattr(cls, "sub_configs", {})}
    own = {name: value for name, value in config.to_dict().items() if name not in (*_NOT_COPIED, *fixed)}
    for name, value in own.items():
        if isinstance(inner.get(name), transformers.PreTrainedConfig):
            small[name] = tiny_like(inner[name]).to_dict()
        elif isinstance(value, (bool, str)) or (value is None and name in small):
            small[name] = value
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and name not in small:
            small[name] = _FIRST_SPECIAL + len(small) % (VOCABULARY - _FIRST_SPECIAL)
    heads, groups = own.get("num_attention_heads"), own.get("num_key_value_heads")
    if isinstance(heads, int) and heads == groups and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    kinds = own.get("layer_types")
    if isinstance(kinds, list) and "num_hidden_layers" in small:
        distinct = list(dict.fromkeys(kinds))
        small["num_hidden_layers"] = max(2, len(distinct))
        small["layer_types"] = (distinct * 2)[: small["num_hidden_layers"]]
    return cls(**{name: value for name, value in small.items() if name != "model_type"})


_FIRST_SPECIAL = 100
_NOT_COPIED = (
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "_name_or_path",
    "auto_map",
)
"""What `tiny_like` does not copy: a tiny model is never quantized, and no remote code is run."""
