"""Attention as MVP computes it, in its encoder, in its decoder and between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import attention_scores
from softhooks.compat.cache_argument import cache_in


def mvp(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of MVP, and project the output; MVP's own prompts are not supported."""
    if call.get("attn_prompt") is not None:
        return None
    query = _heads(module, module.q_proj(call["hidden_states"]) * module.scaling)
    dropout = functools.partial(nn.functional.dropout, p=module.dropout, training=module.training)
    options = {"scaling": 1.0, "dropout": dropout, "function": _with_full_weights, "is_causal": False}
    output, weights = attention(module, query, *_keys_and_values(module, call), call.get("attention_mask"), **options)
    return module.out_proj(output.flatten(2)), weights if call.get("output_attentions") else None


def _keys_and_values(module: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    cache, encoded = cache_in(call), call.get("key_value_states")
    has_two = isinstance(cache, EncoderDecoderCache)
    own = cache if not has_two else cache.self_attention_cache if encoded is None else cache.cross_attention_cache
    if encoded is not None and has_two and cache.is_updated.get(module.layer_idx):
        return own.layers[module.layer_idx].keys, own.layers[module.layer_idx].values
    states = call["hidden_states"] if encoded is None else encoded
    key, value = (_heads(module, part(states)) for part in (module.k_proj, module.v_proj))
    if cache is not None:
        key, value = own.update(key, value, module.layer_idx)
        if encoded is not None and has_two:
            cache.is_updated[module.layer_idx] = True
    return key, value


def _heads(module: Any, states: Tensor) -> Tensor:
    heads: Tensor = states.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
    return heads


def _with_full_weights(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: Callable[[Tensor], Tensor],
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention, and return the weights as they are before the dropout."""
    weights = nn.functional.softmax(attention_scores(module, query, key, mask, scaling), dim=-1)
    return torch.matmul(dropout(weights), value).transpose(1, 2).contiguous(), weights
