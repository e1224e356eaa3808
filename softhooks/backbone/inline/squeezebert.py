"""Attention as SqueezeBERT computes it, on hidden states [B, H, T]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import attention_scores, inline_attention
from softhooks.backbone.inline.bert import divided


def squeezebert(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of SqueezeBERT, which returns the scores of attention in place of its weights."""
    states = call["hidden_states"]
    query, key, value = (module.transpose_for_scores(part(states)) for part in (module.query, module.key, module.value))
    function = _attention_with_scores if call.get("output_attentions") else inline_attention
    options = {**divided(module), "function": function}
    output, scores = attention(module, query, key, value, call.get("attention_mask"), **options)
    result = {"context_layer": output.flatten(2).transpose(1, 2)}
    return {**result, "attention_score": scores} if call.get("output_attentions") else result


def _attention_with_scores(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, Tensor]:
    output, _ = inline_attention(module, query, key, value, mask, scaling, **options)
    return output, attention_scores(module, query, key, mask, scaling, divisor=options["divisor"])
