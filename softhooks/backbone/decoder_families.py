"""Decoders that compute attention in the forward of a module, and that a prefix enters through their cache.

BLOOM, Falcon, MPT, TrOCR and XGLM do not use transformers' attention interface. The forward of each family does the same
operations as the module's own, and calls an attention function, so that a gated branch can enter (`decoder_attention`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.compat.cache_argument import cache_in


@dataclass(frozen=True)
class InlineDecoder:
    """How a family of decoders computes attention.

    Attributes:
        forward: computes the forward of an attention module from its arguments (by name) and an attention function.
        attention: computes attention with the same operations as the family.
    """

    forward: Callable[[Any, dict[str, Any], AttentionFunction], Any]
    attention: AttentionFunction


def _updated(module: Any, call: dict[str, Any], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add the keys and values to the call's cache, if it has one, and return all keys and values."""
    cache = call.get("layer_past", cache_in(call))
    if cache is None:
        return key, value
    updated: tuple[Tensor, Tensor] = getattr(cache, "self_attention_cache", cache).update(key, value, module.layer_idx)
    return updated


def _bloom(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    query, key, value = module._reshape(module.query_key_value(call["hidden_states"]))
    key, value = _updated(module, call, key, value)
    output, weights = attention(
        module, query, key, value, call["attention_mask"], scaling=module.inv_norm_factor, position_bias=call["alibi"]
    )
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


def _falcon(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    states, alibi = call["hidden_states"], call["alibi"]
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(states)))
    if alibi is None:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        query, key = apply_rotary_pos_emb(query, key, *call["position_embeddings"])
    key, value = _updated(module, call, key, value)
    # With SDPA, the model has added the ALiBi bias to the mask.
    sdpa = module.config._attn_implementation == "sdpa" and not call.get("output_attentions")
    output, weights = attention(
        module,
        query,
        key,
        value,
        call["attention_mask"],
        scaling=module.inv_norm_factor,
        position_bias=alibi,
        sdpa=sdpa,
    )
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


def _mpt(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    fused = module.Wqkv(call["hidden_states"])
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    shape = (*fused.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in fused.chunk(3, dim=2))
    key, value = _updated(module, call, key, value)
    bias = call["position_bias"]
    if bias is not None:
        bias = bias[..., max(0, bias.shape[-1] - key.shape[2]) :]
    output, weights = attention(
        module, query, key, value, call.get("attention_mask"), scaling=module.softmax_scale, position_bias=bias
    )
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


def _xglm(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the self-attention of XGLM and TrOCR, which scale the query before the product."""
    states = call["hidden_states"]
    query, key, value = (part(states) for part in (module.q_proj, module.k_proj, module.v_proj))
    shape = (*states.shape[:2], -1, module.head_dim)
    query, key, value = ((part.view(shape).transpose(1, 2)) for part in (query * module.scaling, key, value))
    key, value = _updated(module, call, key, value)
    output, weights = attention(module, query, key, value, call.get("attention_mask"), scaling=1.0)
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


_FAMILIES = {
    ("modeling_bloom", "BloomAttention"): InlineDecoder(_bloom, _bloom_attention),
    ("modeling_falcon", "FalconAttention"): InlineDecoder(_falcon, _falcon_attention),
    ("modeling_mpt", "MptAttention"): InlineDecoder(_mpt, _mpt_attention),
    ("modeling_xglm", "XGLMAttention"): InlineDecoder(_xglm, _xglm_attention),
    ("modeling_trocr", "TrOCRAttention"): InlineDecoder(_xglm, functools.partial(_xglm_attention, lowest=False)),
}
"""The families that compute attention in their forward, by the modeling file and the class of the attention module."""


def family_of(module: nn.Module) -> InlineDecoder | None:
    """Return how a module computes attention, or None if it belongs to no family in this file."""
    keys = [(cls.__module__.rpartition(".")[2], cls.__name__) for cls in type(module).__mro__]
    return next((_FAMILIES[key] for key in keys if key in _FAMILIES), None)
