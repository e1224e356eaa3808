"""Attention as BLOOM, Falcon, MPT, TrOCR and XGLM compute it; these decoders do not use transformers' attention interface.

The functions are for gated branches only (`decoder_attention`), because prefixes enter through the cache. They do the same
operations as the models, so that a closed gate changes no bit. The models' biases and masks differ too much for one function.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import FamilyForward
from softhooks.compat.cache_argument import cache_in


def _updated(module: Any, call: dict[str, Any], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add the keys and values to the call's cache, if it has one, and return all keys and values."""
    cache = call.get("layer_past", cache_in(call))
    if cache is None:
        return key, value
    updated: tuple[Tensor, Tensor] = getattr(cache, "self_attention_cache", cache).update(key, value, module.layer_idx)
    return updated


def bloom(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of BLOOM, and add the residual, as its attention module does."""
    query, key, value = module._reshape(module.query_key_value(call["hidden_states"]))
    key, value = _updated(module, call, key, value)
    options = {"scaling": module.inv_norm_factor, "position_bias": call["alibi"], "function": _bloom_attention}
    output, weights = attention(module, query, key, value, call["attention_mask"], **options)
    output = functional.dropout(module.dense(output.flatten(2)), p=module.hidden_dropout, training=module.training)
    return call["residual"] + output, weights


def _bloom_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, position_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute attention with an ALiBi bias, [B * Hq, 1, K]."""
    query, keys = query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)
    scores = position_bias.baddbmm(query, keys, beta=module.beta, alpha=scaling).unflatten(0, (value.shape[0], -1))
    scores = scores if mask is None else scores + mask
    weights = module.attention_dropout(functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    return torch.matmul(weights, value).transpose(1, 2), weights


def falcon(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of Falcon, with rotary positions or an ALiBi bias, by SDPA or written out."""
    states, alibi = call["hidden_states"], call["alibi"]
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(states)))
    if alibi is None:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        query, key = apply_rotary_pos_emb(query, key, *call["position_embeddings"])
    key, value = _updated(module, call, key, value)
    # With SDPA, the model has added the ALiBi bias to the mask.
    sdpa = module.config._attn_implementation == "sdpa" and not call.get("output_attentions")
    options = {"scaling": module.inv_norm_factor, "position_bias": alibi, "sdpa": sdpa, "function": _falcon_attention}
    output, weights = attention(module, query, key, value, call["attention_mask"], **options)
    return module.dense(output.flatten(2)), weights


def _falcon_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None,
    sdpa: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with rotary positions, or with an ALiBi bias, [B * Hq, 1, K] or [B, Hq, 1, K]."""
    if sdpa:
        dropout = module.attention_dropout.p if module.training and position_bias is not None else 0.0
        is_causal = module.is_causal and mask is None and query.shape[2] > 1
        output = functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
        return output.transpose(1, 2), None
    scores = query @ key.transpose(-1, -2)
    if position_bias is None:
        scores = scores / math.sqrt(query.shape[-1])
    else:
        bias = position_bias.view(query.shape[0], query.shape[1], 1, -1)
        scores = (scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias) * scaling
    weights = functional.softmax(scores if mask is None else scores + mask, dim=-1, dtype=value.dtype)
    if position_bias is not None:
        weights = module.attention_dropout(weights)
    return (weights @ value).transpose(1, 2), weights


def mpt(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of MPT, whose bias may cover more keys than there are."""
    fused = module.Wqkv(call["hidden_states"])
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    shape = (*fused.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in fused.chunk(3, dim=2))
    key, value = _updated(module, call, key, value)
    bias = call["position_bias"]
    if bias is not None:
        bias = bias[..., max(0, bias.shape[-1] - key.shape[2]) :]
    options = {"scaling": module.softmax_scale, "position_bias": bias, "function": _mpt_attention}
    output, weights = attention(module, query, key, value, call.get("attention_mask"), **options)
    return module.out_proj(output.flatten(2)), weights


def _mpt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with an ALiBi bias, [Hq, 1, K], and a mask that is True for the keys to hide."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = scores if position_bias is None else scores + position_bias
    scores = scores if mask is None else scores.masked_fill(mask, torch.finfo(query.dtype).min)
    weights = functional.softmax(scores.float(), dim=-1).to(value.dtype)
    weights = functional.dropout(weights, p=module.attn_dropout_p, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def xglm(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the self-attention of XGLM."""
    return _bart(module, call, attention, _xglm_attention)


def trocr(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the self-attention of TrOCR, which returns attention weights only if they are asked for."""
    output, weights = _bart(module, call, attention, functools.partial(_xglm_attention, lowest=False))
    return output, weights if call.get("output_attentions") else None


def _bart(module: Any, call: dict[str, Any], attention: AttentionFunction, function: AttentionFunction) -> Any:
    """Compute self-attention that scales the query before the product."""
    states = call["hidden_states"]
    shape = (*states.shape[:2], -1, module.head_dim)
    parts = (module.q_proj(states) * module.scaling, module.k_proj(states), module.v_proj(states))
    query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
    key, value = _updated(module, call, key, value)
    output, weights = attention(module, query, key, value, call.get("attention_mask"), scaling=1.0, function=function)
    return module.out_proj(output.flatten(2)), weights


def _xglm_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, lowest: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute attention over a scaled query.

    Args:
        lowest: whether the lowest score is the lowest finite number.
    """
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = scores if mask is None else scores + mask
    if lowest:
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    else:
        weights = functional.softmax(scores, dim=-1)
    weights = weights.to(query.dtype)
    dropped = functional.dropout(weights, p=module.dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2), weights


DECODERS: dict[tuple[str, str], FamilyForward] = {
    ("modeling_bloom", "BloomAttention"): bloom,
    ("modeling_falcon", "FalconAttention"): falcon,
    ("modeling_mpt", "MptAttention"): mpt,
    ("modeling_xglm", "XGLMAttention"): xglm,
    ("modeling_trocr", "TrOCRAttention"): trocr,
}
"""The forward of each family, by the modeling file and the class of the attention module."""
