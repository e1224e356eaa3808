"""Naive generation on a bare model: every token by a full forward of one unpadded row, without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracles
import torch
import zoo
from torch import Tensor, nn
from transformers import DynamicCache

Step = Callable[[Tensor], Tensor]
"""The logits of the token that follows a row: [T] -> [V]."""


def bare_step(model: Any) -> Step:
    """The naive step of the bare model."""
    return lambda row: model(input_ids=row[None], use_cache=False).logits[0, -1]


def prompt_step(model: Any, rows: Tensor, placement: str = "front", head: Tensor | None = None) -> Step:
    """A causal model with the prompt's rows [P, H] among its embeddings; `head` are embeddings before the ids."""

    def step(row: Tensor) -> Tensor:
        embedded = model.get_input_embeddings()(row[None])
        if head is not None:
            embedded = torch.cat([head[None], embedded], dim=1)
        wide = oracles.concatenated(embedded, rows, placement)
        call = {"inputs_embeds": wide, "attention_mask": torch.ones(wide.shape[:2], dtype=torch.long)}
        if model.config.model_type != "bloom":  # has no positions
            call["position_ids"] = torch.arange(wide.shape[1])[None]
        return model(**call, use_cache=False).logits[0, -1]

    return step


def prefix_step(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], head: Tensor | None = None) -> Step:
    """A causal model with a cache that was filled with keys and values, [1, Hk, P, D] per layer."""
    length = keys[0].shape[2]

    def step(row: Tensor) -> Tensor:
        cache = DynamicCache()  # without the config no layer slides: windows are the mask's alone
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, layer)
        call: dict[str, Any] = {"input_ids": row[None]}
        if head is not None:
            call = {"inputs_embeds": torch.cat([head, model.get_input_embeddings()(row)])[None]}
        columns = length + row.shape[0] + (0 if head is None else head.shape[0])
        call["attention_mask"] = torch.ones(1, columns, dtype=torch.long)
        if model.config.model_type != "bloom":
            call["position_ids"] = torch.arange(length, columns)[None]
        return model(**call, past_key_values=cache).logits[0, -1]

    return step


def step_of(model: Any, prompt: Any, head: Tensor | None = None) -> Step:
    """The naive step of a prompt on a causal model; `model` is another instance with the same weights."""
    if prompt is None:
        return bare_step(model)
    tables = {name: parameter.detach() for name, parameter in prompt.encoder.named_parameters()}
    if "embeddings" in tables:
        return prompt_step(model, tables["embeddings"], prompt.method.placement, head)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys, values = oracles.cut_table(tables["text"], config.num_hidden_layers, heads)
    return prefix_step(model, keys, values, head)


@torch.no_grad()
def greedy(step: Step, row: Tensor, count: int) -> Tensor:
    """Greedy decoding of `count` tokens. [T] -> [T + count]."""
    for _ in range(count):
        row = torch.cat([row, step(row).argmax()[None]])
    return row


@torch.no_grad()
def beam(step: Step, row: Tensor, beams: int, count: int) -> Tensor:
    """Beam search with `beams` beams. [T] -> [T + count]."""
    kept = [(0.0, row)]
    for _ in range(count):
        grown = []
        for score, candidate in kept:
            likelihoods = step(candidate).float().log_softmax(-1)
            best = likelihoods.topk(beams)
            grown += [
                (score + float(more), torch.cat([candidate, token[None]]))
                for more, token in zip(best.values, best.indices, strict=True)
            ]
        kept = sorted(grown, key=lambda item: -item[0])[:beams]
    return kept[0][1]


@torch.no_grad()
def sample(steps: Sequence[Step], rows: Sequence[Tensor], count: int, seed: int) -> list[Tensor]:
    """Sampling, with one draw per token for all rows, from one seed."""
    torch.manual_seed(seed)
    grown = list(rows)
    for _ in range(count):
        logits = torch.stack([step(row) for step, row in zip(steps, grown, strict=True)])
        drawn = torch.multinomial(logits.float().softmax(-1), num_samples=1)
        grown = [torch.cat([row, token]) for row, token in zip(grown, drawn, strict=True)]
    return grown


def left_padded(rows: Sequence[Tensor], columns: int | None = None, pad: int = zoo.PAD) -> dict[str, Tensor]:
    """A left-padded batch of rows."""
    columns = columns or max(len(row) for row in rows)
    ids = torch.full((len(rows), columns), pad)
    mask = torch.zeros(len(rows), columns, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, columns - len(row) :], mask[i, columns - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def endless(model: Any) -> Any:
    """Remove a model's end-of-text token, so that it generates as many tokens as asked."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = zoo.PAD
    return model


def encoder_step(model: Any, text: Tensor, rows: Tensor, placement: str = "front") -> Step:
    """An encoder-decoder with the prompt's rows among its encoder's embeddings; the step grows the decoder's row."""
    wide = oracles.concatenated(model.get_input_embeddings()(text[None]), rows, placement)
    return lambda row: model(inputs_embeds=wide, decoder_input_ids=row[None], use_cache=False).logits[0, -1]


def three_prefixes_step(model: Any, text: Tensor, tables: dict[str, Tensor]) -> Step:
    """An encoder-decoder whose every attention sees its part of the tables `encoder`, `decoder` and `cross`."""
    cut = {group: list(zip(*oracles.cut_table(table, 2, 4), strict=True)) for group, table in tables.items()}
    order = [*cut["encoder"], *(pair for both in zip(cut["decoder"], cut["cross"], strict=True) for pair in both)]

    def step(row: Tensor) -> Tensor:
        with oracles.patched_attention(order):
            return model(input_ids=text[None], decoder_input_ids=row[None], use_cache=False).logits[0, -1]

    return step


def seq2seq_step(model: Any, prompt: Any, text: Tensor) -> Step:
    """The naive step of a prompt on an encoder-decoder, for one text."""
    if prompt is None:
        return lambda row: model(input_ids=text[None], decoder_input_ids=row[None], use_cache=False).logits[0, -1]
    tables = {name: parameter.detach() for name, parameter in prompt.encoder.named_parameters()}
    if "embeddings" in tables:
        return encoder_step(model, text, tables["embeddings"], prompt.method.placement)
    return three_prefixes_step(model, text, tables)


def shapes(value: Any) -> Any:
    """The shapes of all tensors in nested tuples."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [shapes(item) for item in value] if isinstance(value, (tuple, list)) else type(value)


def without_dropout(model: Any) -> Any:
    """Set every dropout rate of a model to 0, wherever it is stored."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model
