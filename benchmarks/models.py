"""Models from configs, with random weights, and random text for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.profiles import Shape, Size

IGNORED = -100
"""The label of a token that is not trained."""

Batch = dict[str, Tensor]


def llama(size: Size, seed: int) -> LlamaForCausalLM:
    """Build a frozen Llama with weights large enough for the prompt to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=1024,
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.train()
    return model


def in_fp64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Convert a model to fp64 in place, its norms included: those of transformers always compute in fp32."""
    for module in model.modules():
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):
                exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)
    nn.Module.to(model, torch.float64)
    return model


def token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The loss of a causal model from the logits of the text, in their own precision. [B, T, V] -> []."""
    labels = batch["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)


def text(size: Size, shape: Shape, seed: int) -> Batch:
    """Draw a batch of unpadded text as a data collator gives it.

    The first real token has no label: PEFT's embedding prompts train it, softhooks and the bare model do not, and all
    contestants must compute the same loss.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.vocabulary, (shape.rows, shape.columns), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def words(size: Size, count: int, seed: int) -> Tensor:
    """Draw the ids of a hard prompt, [P]."""
    return torch.randint(1, size.vocabulary, (count,), generator=torch.Generator().manual_seed(seed + 1))
