"""The attention function that rewritten forwards call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction

FamilyForward = Callable[[nn.Module, dict[str, Any], AttentionFunction], Any]
"""Computes the forward of an attention module from its arguments (by name) and an attention function.

The attention function takes module, query, key, value, mask and the options of `inline_attention`. The option `function` is the
function that computes attention, if it is not `inline_attention`. A `FamilyForward` returns None if it does not support the call.
"""


def inline_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    softmax: Callable[[Tensor], Tensor] | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    divisor: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as the model families in this package do.

    Args:
        attention_mask: [B, 1, 1 or T, K], additive, or bool with True for the keys to attend to.
        position_bias: added to the scores, [1 or B, Hq, T, K].
        softmax: applied to the scores; None for the softmax over the keys.
        dropout: applied to the weights; None for `module.dropout`.
        divisor: what the scores are divided by, 1 / `scaling`; None to multiply keys by `scaling` (rounds differently).

    Shape:
        query [B, Hq, T, D], key and value [B, Hq, K, D] -> [B, T, Hq, D] and the weights, [B, Hq, T, K].
    """
    scores = attention_scores(module, query, key, attention_mask, scaling, position_bias, divisor)
    weights = nn.functional.softmax(scores, dim=-1) if softmax is None else softmax(scores)
    weights = (module.dropout if dropout is None else dropout)(weights)
    if getattr(module, "head_weights_proj", None) is not None:
        weights = module.head_weights_proj(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_scores(
    module: Any,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """Compute the attention scores, before the softmax, [B, Hq, T, K]; the arguments are those of `inline_attention`."""
    if divisor is None:
        scores = torch.matmul(query, (key * scaling).transpose(-1, -2))
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) / divisor
    if position_bias is not None:
        scores = scores + position_bias
    if getattr(module, "head_logits_proj", None) is not None:  # talking heads (DeBERTa)
        scores = module.head_logits_proj(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores if attention_mask is None else scores + attention_mask
