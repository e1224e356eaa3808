"""Attention as ConvBERT computes it, with a convolution over the text beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.bert import divided, projected


def convbert(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of ConvBERT; its convolution reads the text alone, without a prefix."""
    states = call["hidden_states"]
    query, key, value = projected(module, states)
    output, weights = attention(module, query, key, value, call.get("attention_mask"), **divided(module))
    return torch.cat([output, _convolved(module, states, query)], 2).flatten(2), weights


def _convolved(module: Any, states: Tensor, query: Tensor) -> Tensor:
    """Weight each token's neighbors by a kernel computed from the token. [B, T, H] -> [B, T, Hq, D]."""
    batch, columns, _ = states.shape
    near = module.key_conv_attn_layer(states.transpose(1, 2)).transpose(1, 2)
    kernel = module.conv_kernel_layer(near * query.transpose(1, 2).flatten(2))
    kernel = kernel.reshape(-1, module.conv_kernel_size, 1).softmax(1)
    rows = module.conv_out_layer(states).transpose(1, 2).contiguous().unsqueeze(-1)
    size = module.conv_kernel_size
    rows = nn.functional.unfold(rows, kernel_size=(size, 1), padding=((size - 1) // 2, 0))
    rows = rows.transpose(1, 2).reshape(-1, module.attention_head_size, size)
    return torch.matmul(rows, kernel).reshape(batch, columns, -1, module.attention_head_size)
