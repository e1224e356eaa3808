"""How much projection and the context loss help CPT, on a synthetic few-shot task.

A row is `name a b c = y ;`: the name says which letter is asked for, and by how much it is shifted. A small Llama is trained
on sequences of rows of one task, some with the task's name and some with an uninformative sign; the answer of a repeated row
can be copied. Then it is frozen. A context of two rows without the name does not reveal the task, so in-context learning
fails. CPT may move the context's signs and letters, and is trained on these two rows; rows that it has not seen show whether
it has found the task. Without projection it memorizes the two rows; without the context loss it can copy them.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import softhooks
from benchmarks.clock import one_thread
from benchmarks.models import IGNORED, Batch
from benchmarks.profiles import Profile
from benchmarks.result import Column, Result, Target

LETTERS, PLACES, MOVES = 8, 3, 3
TASKS = PLACES * MOVES
SIGN, NAMES = LETTERS, LETTERS + 1
EQUALS = NAMES + TASKS
END = EQUALS + 1
ROW = 7
"""Tokens of a row."""

SHOTS, TESTED = 2, 300
RATE = 5e-2
BOUNDS: dict[str, Any] = {"epsilon_input": 0.5, "epsilon_format": 3.0}
"""In a model of width 64: a quarter of a letter's length, and a little more than a sign's."""

FREE: dict[str, Any] = {"epsilon_input": None, "epsilon_format": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "CPT": BOUNDS,
    "without projection": FREE,
    "without context loss": {**BOUNDS, "context_loss": False},
    "without both": {**FREE, "context_loss": False},
    "leave one out": {**BOUNDS, "leave_one_out": True},
}
REQUIRED = 0.2
"""How much lower the loss on unseen rows must be with projection, and with the context loss."""

COLUMNS = (
    Column("trained", "{variant}"),
    Column("loss at the end", "{loss:.3f}"),
    Column("loss on unseen rows", "{unseen:.2f}"),
    Column("accuracy on unseen rows", "{accuracy:.3f} ({worst:.3f} to {best:.3f})"),
    Column("runs above 0.9", "{solved:.0%}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Train contexts that differ in one part of the method each."""
    task = progress.add_task("few shots", total=1 + profile.shot_seeds * len(VARIANTS))
    rows: list[dict[str, Any]] = []
    with one_thread():
        base = pretrained(profile.seed, profile.shot_pretraining)
        progress.advance(task)
        for variant, options in VARIANTS.items():
            outcomes = []
            for seed in range(profile.shot_seeds):
                outcomes.append(adapt(base, seed, profile.shot_steps, **options))
                progress.advance(task)
            rows.append({"variant": variant, **_summary(outcomes)})
    unseen = {row["variant"]: row["unseen"] for row in rows}
    return Result(
        name="few_shot",
        title="CPT on a few-shot task: with and without projection and context loss",
        explanation=(
            f"A frozen toy model and contexts of {SHOTS} rows, which are also all that is trained on; means over "
            f"{profile.shot_seeds} tasks and seeds, with the worst and the best. In-context learning alone: accuracy "
            f"{rows[0]['untrained']:.3f}."
        ),
        columns=COLUMNS,
        rows=rows,
        targets=[
            Target(
                f"CPT {variant}: loss on unseen rows above CPT's", unseen[variant] - unseen["CPT"], "at least", REQUIRED
            )
            for variant in ("without projection", "without context loss")
        ],
        settings={"pretraining": profile.shot_pretraining, "steps": profile.shot_steps, "seeds": profile.shot_seeds},
    )


def rows_of(tasks: Tensor, count: int, generator: torch.Generator, named: float, repeated: float = 0.0) -> Tensor:
    """Draw sequences of rows, each sequence of one task.

    Args:
        tasks: of the sequences, [B].
        named: how many rows have the task's name.
        repeated: how many rows are repetitions.

    Shape:
        -> [B, count, ROW]
    """
    batch = len(tasks)
    letters = torch.randint(LETTERS, (batch, count, PLACES), generator=generator)
    for number in range(1, count):
        again = torch.rand(batch, generator=generator) < repeated
        before = (torch.rand(batch, generator=generator) * number).long()
        letters[again, number] = letters[torch.arange(batch), before][again]
    place, move = (tasks // MOVES).view(-1, 1, 1).expand(-1, count, 1), (tasks % MOVES).view(-1, 1, 1)
    answer = (letters.gather(-1, place) + 2 * move) % LETTERS
    has_name = torch.rand(batch, count, 1, generator=generator) < named
    first = torch.where(has_name, NAMES + tasks.view(-1, 1, 1), torch.tensor(SIGN))
    return torch.cat([first, letters, torch.full_like(answer, EQUALS), answer, torch.full_like(answer, END)], dim=-1)


def labeled(rows: Tensor) -> Batch:
    """Rows up to their answers, which are the only labels. [..., ROW] -> [-1, ROW - 1]."""
    ids = rows[..., :-1].flatten(0, -2)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def types_of(shots: int) -> list[int]:
    """The types of a context of rows: a format, three letters, a format, the label, a separator."""
    return [kind and 4 * shot + kind for shot in range(shots) for kind in (1, 2, 2, 2, 3, 4, 0)]


def pretrained(seed: int, steps: int) -> LlamaForCausalLM:
    """Train the toy model, and freeze it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tasks = torch.randint(TASKS, (64,), generator=generator)
        ids = rows_of(tasks, 5, generator, named=0.5, repeated=0.4)
        labels = torch.full_like(ids, IGNORED)
        labels[..., -2] = ids[..., -2]
        model(input_ids=ids.flatten(1), labels=labels.flatten(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval().requires_grad_(False)


def adapt(
    base: LlamaForCausalLM,
    seed: int,
    steps: int,
    shots: int = SHOTS,
    rate: float = RATE,
    train: Callable[[Any, Any, Batch], float] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train one context on its own rows. -> its last loss; accuracy on unseen rows before and after, and the loss on them.

    Args:
        train: trains the model and its prompt on a batch, and returns the last loss; None: a plain loop.
    """
    generator = torch.Generator().manual_seed(seed)
    task = torch.tensor([seed % TASKS])
    context = rows_of(task, shots, generator, named=0.0)
    tested = labeled(rows_of(task, TESTED, torch.Generator().manual_seed(seed + 1000), named=0.0))
    batch = labeled(context)
    method = softhooks.ContextAwarePromptTuning(context_ids=context.flatten(), token_types=types_of(shots), **options)
    if method.leave_one_out:
        batch["example_ids"] = torch.arange(shots)
    model = copy.deepcopy(base)
    with softhooks.attach(model, method) as prompt:
        before, _ = _judge(model, tested)
        loss = _train(model, prompt, batch, steps, rate) if train is None else train(model, prompt, batch)
        accuracy, unseen = _judge(model.eval(), tested)
        prompt.verify_frozen()
    return {"untrained": before, "accuracy": accuracy, "unseen": unseen, "loss": loss}


def _train(model: Any, prompt: softhooks.SoftPrompt, batch: Batch, steps: int, rate: float) -> float:
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=rate)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def _judge(model: Any, rows: Batch) -> tuple[float, float]:
    """Accuracy and loss of the answers."""
    output = model(**rows)
    said: Tensor = output.logits[:, -2].argmax(-1)
    return float((said == rows["input_ids"][:, -1]).float().mean()), float(output.loss)


def _summary(outcomes: list[dict[str, float]]) -> dict[str, float]:
    accuracies = [outcome["accuracy"] for outcome in outcomes]
    means = {name: statistics.mean(outcome[name] for outcome in outcomes) for name in outcomes[0]}
    solved = statistics.mean(accuracy > 0.9 for accuracy in accuracies)
    return means | {"worst": min(accuracies), "best": max(accuracies), "solved": solved}
