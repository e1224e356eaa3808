"""The expected outputs of prompts, computed naively on the bare model: one row at a time, without softhooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache


def concatenated(embedded: Tensor, prompt: Tensor, placement: str) -> Tensor:
    """Insert prompt rows into the embeddings of one unpadded row, by hand. [1, T, H], [P, H] -> [1, T + P, H]."""
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


def woven(embedded: Tensor, slots: Tensor, offsets: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Insert slots into one unpadded row by hand, each after `offsets` tokens of it; also return each token's new place.

    Shape:
        [1, T, H], [S, H] -> [1, T + S, H]
    """
    pieces: list[Tensor] = []
    places = []
    for token in range(embedded.shape[1] + 1):
        pieces += [slot.to(embedded) for slot, offset in zip(slots, offsets, strict=True) if offset == token]
        if token < embedded.shape[1]:
            places.append(len(pieces))
            pieces.append(embedded[0, token])
    return torch.stack(pieces)[None], places


def woven_logits(model: Any, ids: Tensor, slots: Tensor, offsets: Sequence[int], causal: bool, **call: Any) -> Tensor:
    """Logits of one unpadded row with slots inserted into its embeddings. [1, T] -> [1, T, V]."""
    wide, places = woven(model.get_input_embeddings()(ids), slots, offsets)
    logits = model(inputs_embeds=wide, **call).logits
    if "decoder_input_ids" in call:
        return logits
    if causal:  # what stands right before the next token predicts it
        places = [place - 1 for place in places[1:]] + [wide.shape[1] - 1]
    return logits[:, places]


def prompted(model: Any, ids: Tensor, prompt: Tensor, placement: str, causal: bool, **call: Any) -> Tensor:
    """Logits of one unpadded row with the prompt in its embeddings. [1, T] -> [1, T, V]."""
    embedded = concatenated(model.get_input_embeddings()(ids), prompt, placement)
    logits = model(inputs_embeds=embedded, **call).logits
    if "decoder_input_ids" in call:
        return logits
    return text_states(logits, prompt.shape[0], placement, causal)


def seeded_cache(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds the prefix, as after reading its tokens."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    return cache


def prefixed(model: Any, ids: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Logits of one unpadded row of a causal model with a filled cache. [1, T] -> [1, T, V]."""
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


@contextmanager
def written_out(model: Any, prefixes: Sequence[tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Let the n-th inline attention module see the n-th prefix, [1, Hk, P, D] each; None: it sees none.

    The model's own code runs; only its softmax gets more columns, and their weighted values are added to the output.
    """
    layers = [module for module in model.modules() if type(module).__name__.endswith("SelfAttention")]
    current: dict[str, Any] = {}
    softmax, matmul, bmm = functional.softmax, torch.matmul, torch.bmm

    def first_factor(original: Any) -> Any:
        def multiply(left: Tensor, right: Tensor) -> Tensor:
            current.setdefault("query", left)
            return original(left, right)

        return multiply

    def wider(scores: Tensor, dim: int) -> Tensor:
        module, (key, _) = current["module"], current["prefix"]
        query = current["query"].reshape(-1, key.shape[1], *current["query"].shape[-2:])
        parts = 1 if hasattr(module, "in_proj") else query.shape[-1]  # DeBERTa has scaled its query by now
        parts *= 1 + len(module.pos_att_type) if hasattr(module, "query_proj") else 1
        more = matmul(query, key.transpose(2, 3)) / parts**0.5
        if getattr(module, "head_logits_proj", None) is not None:
            more = torch.einsum("bhtp,gh->bgtp", more, module.head_logits_proj.weight)
        weights = softmax(torch.cat([more, scores], dim=-1), dim=dim)
        current["weights"] = weights[..., : more.shape[-1]]
        return weights[..., more.shape[-1] :]

    def added() -> Tensor:
        module, weights = current["module"], current["weights"]
        if getattr(module, "head_weights_proj", None) is not None:
            weights = torch.einsum("bhtp,gh->bgtp", weights, module.head_weights_proj.weight)
        return matmul(weights, current["prefix"][1]).transpose(1, 2).flatten(2)

    with ExitStack() as patches:
        for module, prefix in zip(layers, prefixes, strict=True):
            if prefix is None:
                continue

            def enter(module: Any, _args: Any, prefix: Any = prefix) -> None:
                current.clear()
                current.update(module=module, prefix=prefix)
                current["patches"] = inner = ExitStack()
                inner.enter_context(mock.patch.object(torch, "matmul", first_factor(matmul)))
                inner.enter_context(mock.patch.object(torch, "bmm", first_factor(bmm)))
                inner.enter_context(mock.patch.object(functional, "softmax", wider))

            def leave(module: Any, _args: Any, output: Any) -> Any:
                current["patches"].close()
                return output if hasattr(module, "o") else (output[0] + added(), *output[1:])

            handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
            if hasattr(module, "o"):  # MPNet projects inside
                handles.append(module.o.register_forward_pre_hook(lambda _, args: (args[0] + added(),)))
            for handle in handles:
                patches.callback(handle.remove)
        yield
