"""How much gates that start at zero help a LLaMA-Adapter, on a synthetic task.

A small Llama learns to repeat six numbers, each shifted by an amount that a first token gives. Then it is frozen, the first
token is replaced by an unseen one, and an adapter has to learn the amount from a few rows. With random gates, random rows
disturb attention from the first step, and the adapter has to undo that first; with gates at zero it starts from the intact
model. How much that matters depends on the size of the rows, so two sizes are measured, and both kinds of gates start from
the same rows.
"""

from __future__ import annotations

import copy
import statistics
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

NUMBERS, MOVES, LENGTH = 16, 4, 6
HIDDEN, BETWEEN = NUMBERS + MOVES, NUMBERS + MOVES + 1
WANTED = 2
"""The shift that the adapter has to find."""

ROWS, BATCH, TESTED = 16, 64, 256
RATE = 5e-3
LOUD, QUIET = 3.0, 1.0
"""The standard deviations of the adapter's rows; the states that the projections normally see have 1."""

REQUIRED = 0.3
"""How much higher the accuracy must be with gates at zero, with the larger rows."""

COLUMNS = (
    Column("rows start from", "N(0, {init_std:g})"),
    Column("gates start from", "{gates}"),
    Column("loss at step 0", "{first_loss:.2f}"),
    Column("loss at the end", "{loss:.2f}"),
    Column("accuracy", "{accuracy:.3f} ({worst:.3f} to {best:.3f})"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Train adapters that differ only in the initial value of their gates."""
    sizes, kinds = (QUIET, LOUD), ("0", "N(0, 1)")
    task = progress.add_task("zero gate", total=1 + profile.gate_seeds * len(sizes) * len(kinds))
    rows: list[dict[str, Any]] = []
    with one_thread():
        base = _pretrained(profile)
        progress.advance(task)
        for init_std in sizes:
            for gates in kinds:
                outcomes = []
                for seed in range(profile.gate_seeds):
                    outcomes.append(_adapt(base, profile, seed, init_std, is_open=gates != "0"))
                    progress.advance(task)
                rows.append({"init_std": init_std, "gates": gates, **_summary(outcomes)})
    accuracy = {(row["init_std"], row["gates"]): row["accuracy"] for row in rows}
    return Result(
        name="zero_gate",
        title="LLaMA-Adapter: gates that start at zero, and random ones",
        explanation=(
            f"A frozen toy model, an adapter, {ROWS} rows to learn from, {profile.gate_steps} steps; means over "
            f"{profile.gate_seeds} seeds on unseen rows, with the worst and the best. The frozen model alone: loss "
            f"{rows[0]['first_loss']:.2f}."
        ),
        columns=COLUMNS,
        rows=rows,
        targets=[
            Target(
                f"zero gates against random ones, rows from N(0, {LOUD:g}): accuracy gained",
                accuracy[LOUD, "0"] - accuracy[LOUD, "N(0, 1)"],
                "at least",
                REQUIRED,
            )
        ],
        settings={"pretraining": profile.gate_pretraining, "steps": profile.gate_steps, "seeds": profile.gate_seeds},
    )


def _rows(count: int, generator: torch.Generator, hidden: bool) -> Batch:
    """Draw rows `first token, numbers, mark, shifted numbers`; only the last are labels."""
    numbers = torch.randint(NUMBERS, (count, LENGTH), generator=generator)
    moves = torch.full((count, 1), WANTED) if hidden else torch.randint(MOVES, (count, 1), generator=generator)
    first = torch.full((count, 1), HIDDEN) if hidden else NUMBERS + moves
    ids = torch.cat([first, numbers, torch.full((count, 1), BETWEEN), (numbers + 3 * moves) % NUMBERS], dim=1)
    labels = ids.clone()
    labels[:, : LENGTH + 2] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _pretrained(profile: Profile) -> LlamaForCausalLM:
    """Train the toy model, with weights as large as those of models of 100 times the width."""
    torch.manual_seed(profile.seed)
    config = LlamaConfig(
        vocab_size=BETWEEN + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LENGTH + 2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(profile.seed)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=profile.gate_pretraining)
    for _ in range(profile.gate_pretraining):
        model(**_rows(BATCH, generator, hidden=False)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _adapt(base: LlamaForCausalLM, profile: Profile, seed: int, init_std: float, is_open: bool) -> dict[str, float]:
    """Train one adapter. -> its first loss, and loss and accuracy on unseen rows."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    shown = _rows(ROWS, torch.Generator().manual_seed(seed), hidden=True)
    tested = _rows(TESTED, torch.Generator().manual_seed(profile.seed), hidden=True)
    with softhooks.attach(model, softhooks.LlamaAdapter(10, init_std=init_std)) as prompt:
        if is_open:
            with torch.no_grad():
                prompt.encoder.get_parameter("text_gates").normal_()
        first, _ = _judge(model, tested)
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=RATE)
        for _ in range(profile.gate_steps):
            model(**shown).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss, accuracy = _judge(model, tested)
        prompt.verify_frozen()
    return {"first_loss": first, "loss": loss, "accuracy": accuracy}


@torch.no_grad()
def _judge(model: LlamaForCausalLM, rows: Batch) -> tuple[float, float]:
    output = model(**rows)
    said: Tensor = output.logits[:, LENGTH + 1 : -1].argmax(-1)
    return float(output.loss), float((said == rows["labels"][:, LENGTH + 2 :]).float().mean())


def _summary(outcomes: list[dict[str, float]]) -> dict[str, float]:
    accuracies = [outcome["accuracy"] for outcome in outcomes]
    means = {name: statistics.mean(outcome[name] for outcome in outcomes) for name in outcomes[0]}
    return means | {"worst": min(accuracies), "best": max(accuracies)}
