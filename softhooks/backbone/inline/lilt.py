"""Attention as LiLT computes it, over text and layout together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import attention_scores
from softhooks.backbone.inline.bert import projected


def lilt(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of LiLT as one attention, whose heads contain those of the text and of the layout.

    Text and layout share the sum of their scores, so a key is that of the text and that of the layout together. So is a value.
    """
    if call["layout_inputs"].shape[:2] != call["hidden_states"].shape[:2]:
        raise ValueError("each token needs layout inputs")
    text, size = projected(module, call["hidden_states"]), module.attention_head_size
    small = size // module.channel_shrink_ratio
    parts = (module.layout_query, module.layout_key, module.layout_value)
    layout = [part(call["layout_inputs"]).unflatten(-1, (-1, small)).transpose(1, 2) for part in parts]
    query = torch.cat([text[0] / math.sqrt(size), layout[0] / math.sqrt(small)], -1)
    key, value = (torch.cat([text[n], layout[n]], -1) for n in (1, 2))
    options = {"scaling": 1.0, "function": _two_streams, "is_causal": False}
    output, weights = attention(module, query, key, value, call.get("attention_mask"), **options)
    outputs = output[..., :size].flatten(2), output[..., size:].flatten(2)
    return (*outputs, weights) if call.get("output_attentions") else outputs


def _two_streams(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention; the dropout for the layout is drawn before that for the text, as in the model."""
    weights = nn.functional.softmax(attention_scores(module, query, key, mask, scaling), dim=-1)
    text, layout = value.split([module.attention_head_size, value.shape[-1] - module.attention_head_size], dim=-1)
    of_layout = torch.matmul(module.dropout(weights), layout)
    weights = module.dropout(weights)
    return torch.cat([torch.matmul(weights, text), of_layout], -1).transpose(1, 2).contiguous(), weights
