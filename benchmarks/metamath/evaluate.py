"""Evaluation: the accuracy of generated answers, and the loss on Wikipedia."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from benchmarks.metamath.answers import accuracy
from benchmarks.metamath.data import Problem, encode, pad, question_of
from benchmarks.metamath.settings import Settings

WIKIPEDIA_TOKENS = 768


def generation_config(settings: Settings, question_tokens: int, pad_token_id: int) -> GenerationConfig:
    """Return the configuration for questions of a length; of two limits, transformers would ignore `max_length`."""
    options = {name: value for name, value in settings.generation_kwargs.items() if value is not None}
    if {"max_length", "max_new_tokens"} <= set(options):
        options["max_length"] = min(options["max_length"], question_tokens + options.pop("max_new_tokens"))
    return GenerationConfig(**{"pad_token_id": pad_token_id, **options})


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], settings: Settings) -> list[str]:
    """Generate an answer to each question, and return both as one text."""
    texts: list[str] = []
    for first in range(0, len(problems), settings.batch_size_eval):
        questions = [question_of(settings, row.query) for row in problems[first : first + settings.batch_size_eval]]
        batch = pad(tokenizer, encode(tokenizer, questions, settings.max_seq_length), "left")
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        config = generation_config(settings, batch["input_ids"].shape[1], tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(model.generate(**batch, generation_config=config), skip_special_tokens=True)
    return texts


def solved(model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], settings: Settings) -> float:
    """Return the share of problems that the model solves."""
    return accuracy(answer(model, tokenizer, problems, settings), [problem.response for problem in problems])


@torch.no_grad()
def loss_per_token(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int) -> float:
    """Return the mean loss of all tokens of some texts, apart from the first token of each."""
    losses: list[torch.Tensor] = []
    for first in range(0, len(texts), batch_size):
        rows = encode(tokenizer, texts[first : first + batch_size], WIKIPEDIA_TOKENS)
        batch = {name: tensor.to(model.device) for name, tensor in pad(tokenizer, rows, "left").items()}
        logits = model(**batch).logits
        for row, ids, states in zip(rows, batch["input_ids"], logits, strict=True):
            # in the dtype of the logits, as in PEFT's comparison: in bf16, `forgetting` depends on it
            own = functional.cross_entropy(states[-len(row) : -1], ids[1 - len(row) :], reduction="none")
            losses.append(own.float().cpu())
    return float(torch.cat(losses).mean())
