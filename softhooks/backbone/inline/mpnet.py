"""Attention as MPNet computes it."""

from __future__ import annotations

import math
from typing import Any

from softhooks.backbone.forward_pass import AttentionFunction


def mpnet(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of MPNet, which adds a bias to the scores and projects the output."""
    states, bias = call["hidden_states"], call.get("position_bias")
    shape = (*states.shape[:-1], -1, module.attention_head_size)
    query, key, value = (part(states).view(shape).transpose(1, 2) for part in (module.q, module.k, module.v))
    scaling = 1 / math.sqrt(module.attention_head_size)
    output, weights = attention(
        module, query, key, value, call.get("attention_mask"), scaling=scaling, position_bias=bias, is_causal=False
    )
    return (module.o(output.flatten(2)), weights) if call.get("output_attentions") else (module.o(output.flatten(2)),)
