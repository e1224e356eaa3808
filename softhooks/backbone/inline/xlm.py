"""Attention as XLM and FlauBERT compute it."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction


def xlm(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of XLM, with a cache if it is passed, and project the output."""
    states, mask, cache = call["input"], call["mask"], call.get("cache")
    shape = (*states.shape[:-1], module.n_heads, module.head_dim)
    parts = (module.q_lin, module.k_lin, module.v_lin)
    query, key, value = (part(states).view(shape).transpose(1, 2) for part in parts)
    if cache is not None:
        own = getattr(cache, "self_attention_cache", cache)
        key, value = own.update(key, value, module.layer_id)
    seen = (mask != 0)[:, None] if mask.dim() == 3 else (mask != 0)[:, None, None]
    dropout = functools.partial(nn.functional.dropout, p=module.dropout, training=module.training)
    options = {"scaling": 1.0, "softmax": _softmax, "dropout": dropout, "is_causal": False}
    output, weights = attention(module, query / math.sqrt(module.head_dim), key, value, seen, **options)
    output = module.out_lin(output.flatten(2))
    return (output, weights) if call.get("output_attentions") else (output,)


def _softmax(scores: Tensor) -> Tensor:
    return nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
