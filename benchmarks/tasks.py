"""Toy tasks that share a prompt: each task is what a small frozen decoder answers after a hidden prompt of the task.

The hidden prompts are `P o (u v^T)`, with one P for all tasks and u and v drawn around one. So the tasks are related as
multitask prompt tuning assumes; the question is how much that helps, with how many examples. The answer to each prefix of the
text is the token that the decoder finds most likely.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, COLUMNS, LENGTH = 64, 32, 8, 8
SPREAD = 0.5
"""The standard deviation of u and v around one."""

IGNORED = -100

Rows = dict[str, Tensor]


def frozen_model(seed: int) -> LlamaForCausalLM:
    """Make a decoder with random weights, large enough for prompts to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # so that the likeliest token stands out
    return model


class World:
    """Tasks that share a prompt, and rows of them.

    Args:
        model: the frozen decoder.
        seed: of the hidden prompts, and of all rows.

    Attributes:
        words: the tokens that the hidden prompts are near, [P].
    """

    def __init__(self, model: LlamaForCausalLM, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self.words = torch.randperm(VOCABULARY, generator=self.generator)[:LENGTH]
        rows = model.get_input_embeddings()(self.words)
        self.shared: Tensor = rows + 0.2 * torch.randn(rows.shape, generator=self.generator)

    def task(self) -> Tensor:
        """Draw the hidden prompt of a task, [P, H]."""
        left = 1 + SPREAD * torch.randn(LENGTH, 1, generator=self.generator)
        right = 1 + SPREAD * torch.randn(1, WIDTH, generator=self.generator)
        return self.shared * left * right

    @torch.no_grad()
    def rows(self, task: Tensor, count: int) -> Rows:
        """Draw examples of a task: text, and the answers after each token but the last."""
        ids = torch.randint(VOCABULARY, (count, COLUMNS), generator=self.generator)
        embedded = torch.cat([task.expand(count, -1, -1), self.model.get_input_embeddings()(ids)], 1)
        answers = self.model(inputs_embeds=embedded).logits[:, LENGTH:].argmax(-1)
        labels = torch.cat([torch.full((count, 1), IGNORED), answers[:, :-1]], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
