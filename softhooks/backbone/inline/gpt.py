"""Attention as the first GPT computes it."""

from __future__ import annotations

import math
from typing import Any

from softhooks.backbone.forward_pass import AttentionFunction

_HIDDEN = -1e4


def gpt(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of GPT, which is causal whatever the mask, and projects the output."""
    parts = module.c_attn(call["x"]).split(module.split_size, dim=2)
    query, key, value = (module.split_heads(part) for part in parts)
    seen = module.bias[:, :, : query.shape[2], : key.shape[2]]
    mask, given = _HIDDEN * (1 - seen), call.get("attention_mask")
    mask = mask.to(query.dtype) if given is None else mask + given
    divisor = math.sqrt(value.shape[-1]) if module.scale else 1.0
    options = {"scaling": 1 / divisor, "divisor": divisor, "dropout": module.attn_dropout, "is_causal": False}
    output, weights = attention(module, query, key, value, mask, **options)
    output = module.resid_dropout(module.c_proj(output.flatten(2)))
    return [output, weights] if call.get("output_attentions") else [output]
