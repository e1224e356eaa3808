"""What a prompt must compute, done naively on the bare model: one row at a time, nothing shared, no code of softhooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache


def concatenated(embedded: Tensor, prompt: Tensor, placement: str) -> Tensor:
    """Put prompt rows among the embeddings of one unpadded row, by hand. [1, T, H], [P, H] -> [1, T + P, H]."""
    cut = {"front": 0, "after_first": 1, "end": embedded.shape[1]}[placement]
    return torch.cat([embedded[:, :cut], prompt[None].to(embedded), embedded[:, cut:]], dim=1)


def text_states(states: Tensor, length: int, placement: str, causal: bool) -> Tensor:
    """Pick, by hand, the state that belongs to each text token. [1, T + P, ...] -> [1, T, ...]."""
    columns = list(range(states.shape[1]))
    cut = {"front": 0, "after_first": 1, "end": states.shape[1] - length}[placement]
    kept = columns[:cut] + columns[cut + length :]
    if causal and placement != "front":
        kept[cut - 1] = cut + length - 1  # the last slot stands before the next text token, and predicts it
    return states[:, kept]


def prompted(model: Any, ids: Tensor, prompt: Tensor, placement: str, causal: bool, **call: Any) -> Tensor:
    """Logits of one unpadded row with the prompt in its embeddings. [1, T] -> [1, T, V]."""
    embedded = concatenated(model.get_input_embeddings()(ids), prompt, placement)
    logits = model(inputs_embeds=embedded, **call).logits
    if "decoder_input_ids" in call:
        return logits
    return text_states(logits, prompt.shape[0], placement, causal)


def seeded_cache(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds the prefix as if its tokens had been read."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    return cache


def prefixed(model: Any, ids: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Logits of one unpadded row of a causal model behind a seeded cache. [1, T] -> [1, T, V]."""
    length = keys[0].shape[2]
    mask = torch.ones(1, length + ids.shape[1], dtype=torch.long)
    return model(ids, attention_mask=mask, past_key_values=seeded_cache(model, keys, values)).logits


@contextmanager
def patched_attention(prefixes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the n-th call of torch's attention see the n-th prefix, [1, Hk, P, D] each, whatever the model."""
    pending = list(prefixes)
    original = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, is_causal: bool = False, **kw: Any
    ) -> Any:
        more_keys, more_values = pending.pop(0)
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        if attn_mask is not None:
            seen = torch.zeros(1) if attn_mask.is_floating_point() else torch.ones(1, dtype=torch.bool)
            seen = seen.expand(*attn_mask.shape[:-1], more_keys.shape[2])
            attn_mask = torch.cat([seen, attn_mask], -1)
        batch = key.shape[0]
        key = torch.cat([more_keys.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([more_values.expand(batch, -1, -1, -1), value], 2)
        return original(query, key, value, attn_mask=attn_mask, is_causal=False, **kw)

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield
    assert not pending, "the model called attention less often than there are prefixes"


def cut_table(table: Tensor, layers: int, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut a stored prefix by hand: [P, L * 2 * Hk * D] -> keys and values of each layer, [1, Hk, P, D]."""
    length = table.shape[0]
    size = table.shape[1] // (layers * 2 * heads)
    parts = table.detach().reshape(length, layers, 2, heads, size)
    keys = [parts[:, layer, 0].transpose(0, 1)[None] for layer in range(layers)]
    values = [parts[:, layer, 1].transpose(0, 1)[None] for layer in range(layers)]
    return keys, values
