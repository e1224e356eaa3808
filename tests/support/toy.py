"""A tiny model that knows a few functions of one word, and infers from examples which one is meant.

A sequence is `x f(x) y f(y) ...`; in a quarter of its training the function's name stands before it. One word alone does not say
which function is meant: the frozen model guesses, and a prompt that has learned to say it is right on words it was not tuned on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import zoo
from torch import Tensor

FUNCTIONS, WORDS = 4, 16
FIRST_NAME, FIRST_WORD = 4, 10
TUNED, HELD_OUT = range(0, WORDS, 2), range(1, WORDS, 2)


def table() -> Tensor:
    """The answer of each function to each word: permutations. [FUNCTIONS, WORDS]."""
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(WORDS, generator=generator) for _ in range(FUNCTIONS)])


def word(number: Any) -> Any:
    """The id of a word."""
    return number + FIRST_WORD


def pairs(function: int, words: Any) -> Tensor:
    """Rows of a word and its answer, [N, 2]."""
    chosen = torch.as_tensor(list(words))
    return word(torch.stack([chosen, table()[function][chosen]], dim=1))


def _sequences(count: int, shots: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Named and unnamed sequences, and which columns are to be predicted."""
    functions = torch.randint(FUNCTIONS, (count,), generator=generator)
    words = torch.rand(count, WORDS, generator=generator).argsort(-1)[:, :shots]
    answers = table()[functions[:, None], words]
    body = word(torch.stack([words, answers], -1).flatten(1))
    named = torch.rand(count, generator=generator) < 0.25
    name = torch.where(named, FIRST_NAME + functions, zoo.BOS)
    ids = torch.cat([name[:, None], body], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2::2] = ids[:, 2::2]
    return ids, labels


@cache
def _states() -> dict[str, Tensor]:
    """The weights of the trained model."""
    model = zoo.build("llama", seed=1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    steps = 1000
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        ids, labels = _sequences(64, 5, generator)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def model() -> Any:
    """A new model that knows the functions."""
    fresh = zoo.build("llama", seed=1)
    fresh.load_state_dict(_states())
    return fresh.eval()


@torch.no_grad()
def share_right(model: Any, function: int, words: Any = HELD_OUT, before: Tensor | None = None, **call: Any) -> float:
    """The share of words that the model answers by the function, with some ids before each."""
    rows = pairs(function, words)
    ids = rows[:, :1]
    if before is not None:
        ids = torch.cat([before.expand(len(rows), -1), ids], 1)
    found = model(ids, **call).logits[:, -1].argmax(-1)
    return float((found == rows[:, 1]).float().mean())


def tune(
    model: Any, prompt: Any, function: int, words: Any = TUNED, lr: float = 1e-2, steps: int = 150, **call: Any
) -> list[float]:
    """Tune an attached prompt in a plain loop; return the losses."""
    rows = pairs(function, words)
    labels = rows.clone()
    labels[:, 0] = -100
    optimizer = torch.optim.AdamW(list(prompt.parameters()), lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(rows, labels=labels, **call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
