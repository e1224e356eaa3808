"""The oracle: prompts put in by hand, with nothing but the bare model and textbook formulas."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.contestants import PREFIX_MLP, PROMPT, Pair
from benchmarks.models import Batch, token_loss


def backward(base: LlamaForCausalLM, pair: Pair, prompt: list[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss of a prompt and its gradients by hand.

    Args:
        prompt: the rows [P, H]; or the keys and values [P, L * 2 * Hk * D]; or, of the MLP, the rows and each layer's
            weight and bias.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in prompt]
    if pair is PROMPT:
        logits = _prepended(base, leaves[0], batch)
    else:
        logits = _seeded(base, _projected(leaves) if pair is PREFIX_MLP else leaves[0], batch)
    loss = token_loss(logits, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def _prepended(base: LlamaForCausalLM, rows: Tensor, batch: Batch) -> Tensor:
    """Concatenate the rows and the text's embeddings in every row of the batch. -> the text's logits [B, T, V]."""
    embeddings = base.get_input_embeddings()(batch["input_ids"])
    slots = rows[None].expand(embeddings.shape[0], -1, -1)
    logits: Tensor = base(inputs_embeds=torch.cat([slots, embeddings], dim=1), use_cache=False).logits
    return logits[:, rows.shape[0] :]


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
