"""Attention as BERT computes it, without (MegatronBERT, BigBird, TAPAS, ...) and with rotary positions (RoFormer)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.compat.cache_argument import cache_in


def bert(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of BERT, with rotary positions and a cache if they are passed."""
    cache, angles = cache_in(call), call.get("sinusoidal_pos")
    query, key, value = projected(module, call["hidden_states"])
    if angles is not None and module.rotary_value:
        query, key, value = module.apply_rotary_position_embeddings(angles, query, key, value)
    elif angles is not None:
        query, key = module.apply_rotary_position_embeddings(angles, query, key)
    if cache is not None:
        own = getattr(cache, "self_attention_cache", cache)
        key, value = own.update(key, value, module.layer_idx)
    output, weights = attention(module, query, key, value, call.get("attention_mask"), **divided(module))
    return output.flatten(2), weights


def tapas(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of TAPAS, which returns the weights only if asked, and its cache if it is a decoder."""
    output, weights = bert(module, call, attention)
    outputs = (output, weights) if call.get("output_attentions") else (output,)
    return (*outputs, cache_in(call)) if module.is_decoder else outputs


def layoutlmv3(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of LayoutLMv3, which adds biases from relative positions and from boxes to the scores."""
    query, key, value = projected(module, call["hidden_states"])
    root, bias = math.sqrt(module.attention_head_size), None
    if module.has_relative_attention_bias and module.has_spatial_attention_bias:
        bias = (call["rel_pos"] + call["rel_2d_pos"]) / root
    elif module.has_relative_attention_bias:
        bias = call["rel_pos"] / root
    options = {"scaling": 1.0, "position_bias": bias, "softmax": module.cogview_attention, "is_causal": False}
    output, weights = attention(module, query / root, key, value, call.get("attention_mask"), **options)
    return output.flatten(2), weights


def projected(module: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, [B, Hq, T, D], of hidden states [B, T, H]."""
    shape = (*states.shape[:-1], -1, module.attention_head_size)
    query, key, value = (part(states).view(shape).transpose(1, 2) for part in (module.query, module.key, module.value))
    return query, key, value


def divided(module: Any) -> dict[str, Any]:
    """Return the options of an attention that divides its scores by the root of the head size."""
    root = math.sqrt(module.attention_head_size)
    return {"scaling": 1 / root, "divisor": root, "is_causal": False}
