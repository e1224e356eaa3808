"""Attention as Luke computes it, over words and entities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.bert import divided


def luke(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of Luke, in which the query may depend on whether the key is a word's or an entity's.

    The keys of a prefix are those of words.
    """
    words, entities = call["word_hidden_states"], call.get("entity_hidden_states")
    states, size = (words if entities is None else torch.cat([words, entities], 1)), words.shape[1]
    key, value = (module.transpose_for_scores(part(states)) for part in (module.key, module.value))
    bias = None
    if entities is None or not module.use_entity_aware_attention:
        query = module.transpose_for_scores(module.query(states))
    else:
        query = _queries(module, words, entities, module.query, module.e2w_query)
        other = _queries(module, words, entities, module.w2e_query, module.e2e_query)
        # The scores of entities' keys are those of the other query.
        bias = torch.matmul(other - query, key.transpose(-1, -2)) / math.sqrt(module.attention_head_size)
        bias = bias.masked_fill(torch.arange(key.shape[2], device=key.device) < size, 0)
    options = {**divided(module), "position_bias": bias}
    output, weights = attention(module, query, key, value, call.get("attention_mask"), **options)
    output = output.flatten(2)
    outputs = output[:, :size], None if entities is None else output[:, size:]
    return (*outputs, weights) if call.get("output_attentions") else outputs


def _queries(module: Any, words: Tensor, entities: Tensor, of_words: Any, of_entities: Any) -> Tensor:
    query: Tensor = module.transpose_for_scores(torch.cat([of_words(words), of_entities(entities)], 1))
    return query


def with_entities(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with as many entities as words."""
    words = call["word_hidden_states"]
    return {**call, "entity_hidden_states": words.flip(1), "attention_mask": None}
