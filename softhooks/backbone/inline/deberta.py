"""Attention as DeBERTa, DeBERTa-v2 and DeBERTa-v3 compute it, with relative positions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction


def deberta(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of DeBERTa, which projects query, key and value together and adds a bias from the scaled query."""
    query, key, value = module.transpose_for_scores(module.in_proj(call["hidden_states"])).chunk(3, dim=-1)
    query = query + module.transpose_for_scores(module.q_bias[None, None, :])
    value = value + module.transpose_for_scores(module.v_bias[None, None, :])
    parts, bias = 1 + len(module.pos_att_type), None
    query = query / math.sqrt(query.shape[-1] * parts)
    positions, table = call.get("relative_pos"), call.get("rel_embeddings")
    if module.relative_attention and positions is not None and table is not None:
        bias = module.disentangled_att_bias(query, key, positions, module.pos_dropout(table), parts)
    return _disentangled(module, call, attention, (query, key, value), bias, 1.0)


def deberta_v2(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of DeBERTa-v2 and -v3, which fold the heads into the batch dimension, [B * Hq, T, D]."""
    states, heads = call["hidden_states"], module.num_attention_heads
    projections = (module.query_proj, module.key_proj, module.value_proj)
    flat = [module.transpose_for_scores(part(states), heads) for part in projections]
    parts, bias = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c")), None
    if module.relative_attention:
        table = module.pos_dropout(call["rel_embeddings"])
        bias = module.disentangled_attention_bias(flat[0], flat[1], call.get("relative_pos"), table, parts)
    query, key, value = (part.unflatten(0, (-1, heads)) for part in flat)
    bias = bias.unflatten(0, (-1, heads)) if isinstance(bias, Tensor) else None
    return _disentangled(module, call, attention, (query, key, value), bias, 1 / math.sqrt(query.shape[-1] * parts))


def _disentangled(
    module: Any,
    call: dict[str, Any],
    attention: AttentionFunction,
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Any,
    scaling: float,
) -> Any:
    bias = bias if isinstance(bias, Tensor) else None  # without relative attention, it is the number 0
    mask = call["attention_mask"].bool()
    output, weights = attention(module, *parts, mask, scaling=scaling, position_bias=bias, is_causal=False)
    return output.flatten(2), weights if call.get("output_attentions") else None
