"""The oracle: prompts inserted by hand, with the bare model and textbook formulas only."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.contestants import (
    ADAPTER,
    ADAPTER_DEFAULT,
    DECAY,
    MULTITASK,
    P_TUNING,
    PREFIX_MLP,
    PROMPT,
    Pair,
    context_types,
    task_ids,
)
from benchmarks.models import Batch, token_loss


def backward(base: LlamaForCausalLM, pair: Pair, prompt: list[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss of a prompt and its gradients by hand.

    Args:
        prompt: the rows [P, H]; of P-tuning the rows, the LSTM's and the network's weights; or the keys and values
            [P, L * 2 * Hk * D]; or, of the MLP, the rows and each layer's weight and bias; or, of the adapter, the rows of all
            layers [L * P, H] and their gates [1, L], by default [1, L * Hq]; or, of several tasks, the shared rows [P, H], and
            the tasks' vectors less one, in 4/3.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in prompt]
    if pair is PROMPT:
        logits = _prepended(base, leaves[0], batch)
    elif pair is P_TUNING:
        logits = _prepended(base, _reparameterized(leaves), batch)
    elif pair is ADAPTER:
        logits = _branched(base, leaves[0], leaves[1][0], batch)
    elif pair is ADAPTER_DEFAULT:
        logits = _branched(base, leaves[0], leaves[1].tanh().view(base.config.num_hidden_layers, -1, 1, 1), batch)
    elif pair in MULTITASK:
        assert pair.task_of is not None
        shared, left, right = leaves[0], 1 + 0.4 / 0.3 * leaves[1], 1 + 0.4 / 0.3 * leaves[2]
        tasks = task_ids(pair.task_of, batch)
        logits = _prepended(base, shared * (left @ right.mT)[tasks], batch)
    else:
        logits = _seeded(base, _projected(leaves) if pair is PREFIX_MLP else leaves[0], batch)
    loss = token_loss(logits, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def context_backward(base: LlamaForCausalLM, ids: Tensor, delta: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss of a context whose words are moved by `delta`, and its gradient, by hand.

    Every row computes the whole context. The loss is one mean over all label tokens of context and text, which is CPT's loss
    if all rows have equally many.
    """
    types = torch.tensor(context_types(len(ids)))
    leaf = delta.detach().clone().requires_grad_()
    table = base.get_input_embeddings()(ids).detach().clone()
    table[types % 4 != 0] += leaf
    embeddings = base.get_input_embeddings()(batch["input_ids"])
    rows = len(embeddings)
    wide = torch.cat([table[None].expand(rows, -1, -1), embeddings], dim=1)
    targets = torch.cat(
        [torch.where((types > 0) & (types % 4 == 0), ids, -100).expand(rows, -1), batch["labels"]], dim=1
    )
    weights = DECAY ** (types.max() // 4 - (types - 1) // 4).expand(rows, -1).to(wide.dtype)
    weights = torch.cat([weights, torch.ones_like(batch["labels"], dtype=wide.dtype)], dim=1)
    logits = base(inputs_embeds=wide, use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / (targets[:, 1:] != -100).sum()
    return loss.detach(), list(torch.autograd.grad(loss, [leaf]))


def _prepended(base: LlamaForCausalLM, rows: Tensor, batch: Batch) -> Tensor:
    """Concatenate rows [P, H] or [B, P, H] and the text's embeddings, for every row of the batch. -> logits [B, T, V]."""
    embeddings = base.get_input_embeddings()(batch["input_ids"])
    slots = rows.expand(embeddings.shape[0], -1, -1)
    logits: Tensor = base(inputs_embeds=torch.cat([slots, embeddings], dim=1), use_cache=False).logits
    return logits[:, rows.shape[-2] :]


def _reparameterized(prompt: list[Tensor]) -> Tensor:
    """Run rows through a bidirectional LSTM of two layers and a small network."""
    rows, *weights, down, down_bias, up, up_bias = prompt
    for layer in (weights[:8], weights[8:]):
        ahead = _lstm(rows, *layer[:4])
        back = _lstm(rows.flip(0), *layer[4:]).flip(0)
        rows = torch.cat([ahead, back], dim=1)
    return functional.linear(torch.relu(functional.linear(rows, down, down_bias)), up, up_bias)


def _lstm(rows: Tensor, into: Tensor, within: Tensor, bias: Tensor, more_bias: Tensor) -> Tensor:
    """Run one direction of one layer, row by row. [P, H] -> [P, H']"""
    state = cell = rows.new_zeros(within.shape[1])
    states = []
    for row in rows:
        entry, keep, new, out = (into @ row + bias + within @ state + more_bias).chunk(4)
        cell = torch.sigmoid(keep) * cell + torch.sigmoid(entry) * torch.tanh(new)
        state = torch.sigmoid(out) * torch.tanh(cell)
        states.append(state)
    return torch.stack(states)


def _projected(prompt: list[Tensor]) -> Tensor:
    rows, weight, bias, up_weight, up_bias = prompt
    return functional.linear(torch.tanh(functional.linear(rows, weight, bias)), up_weight, up_bias)


def _seeded(base: LlamaForCausalLM, table: Tensor, batch: Batch) -> Tensor:
    """Start from a cache that holds the prefix, copied for every row. -> the text's logits [B, T, V]."""
    config = base.config
    rows = batch["input_ids"].shape[0]
    width = config.hidden_size // config.num_attention_heads
    split = table.view(table.shape[0], config.num_hidden_layers, 2, -1, width)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        key, value = (split[:, layer, part].transpose(0, 1)[None].repeat(rows, 1, 1, 1) for part in (0, 1))
        cache.update(key, value, layer)
    logits: Tensor = base(input_ids=batch["input_ids"], past_key_values=cache).logits
    return logits


def _branched(base: LlamaForCausalLM, rows: Tensor, gates: Tensor, batch: Batch) -> Tensor:
    """Let each layer's call of torch's attention add a second attention to its rows. -> the text's logits [B, T, V]."""
    layers = list(zip(base.model.layers, rows.chunk(len(gates)), gates, strict=True))
    original = functional.scaled_dot_product_attention

    def attend(query: Tensor, *args: Tensor, scale: float, **kwargs: bool) -> Tensor:
        layer, prompt, gate = layers.pop(0)
        projections = (layer.self_attn.k_proj, layer.self_attn.v_proj)
        key, value = (part(prompt).unflatten(1, (query.shape[1], -1)).transpose(0, 1) for part in projections)
        added = (query @ key.mT * scale).softmax(-1) @ value
        return original(query, *args, scale=scale, **kwargs) + gate * added

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        logits: Tensor = base(input_ids=batch["input_ids"], use_cache=False).logits
    return logits
