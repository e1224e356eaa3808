"""How much teachers help a multitask prompt that sees few rows of its source tasks, on the toy tasks of `tasks`.

Each teacher is a vanilla prompt that was trained on many rows of its task, like a saved prompt. The multitask prompt sees a
few of these rows, with and without teachers, for the same number of steps; then both answer new rows of the same tasks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import softhooks
from benchmarks.clock import one_thread
from benchmarks.profiles import Profile, Transfer
from benchmarks.result import Column, Result, Target
from benchmarks.tasks import LENGTH, Rows, World, frozen_model
from benchmarks.transfer import ROWS, SOURCE_RATE, SOURCES, TESTS, again, right, teacher, train

GAIN = 0.05
"""How much higher the share of right answers must be with teachers."""

FEW = 16
TEACHERS, ALONE, TAUGHT = "the teachers themselves", "MPT without distillation", "MPT with distillation"

COLUMNS = (
    Column("prompt", "{prompt}"),
    Column("rows of each task", "{examples}"),
    Column("right on new rows", "{right:.1%}"),
    Column("worst and best seed", "{worst:.1%} to {best:.1%}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Train teachers and multitask prompts with several seeds, and count right answers on new rows."""
    sizes = profile.transfer
    task = progress.add_task("distillation", total=sizes.seeds * (SOURCES + 2))
    with one_thread():
        model = frozen_model(profile.seed)
        found = [_measure(model, sizes, profile.seed + i, lambda: progress.advance(task)) for i in range(sizes.seeds)]
    rows = [_row(found, name, sizes) for name in (TEACHERS, ALONE, TAUGHT)]
    right_of = {row["prompt"]: row["right"] for row in rows}
    return Result(
        name="distillation",
        title="Few rows of each source task: multitask prompts with and without teachers",
        explanation=(
            f"Right answers on {TESTS} new rows of each of {SOURCES} source tasks, the mean of {sizes.seeds} seeds; the teachers "
            f"have seen {sizes.examples} rows of their task, the multitask prompts {_few(sizes)} of these."
        ),
        columns=COLUMNS,
        rows=rows,
        targets=[
            Target(
                f"right answers with distillation from {_few(sizes)} rows, less without",
                right_of[TAUGHT] - right_of[ALONE],
                "at least",
                GAIN,
            )
        ],
        settings={**vars(sizes), "few": _few(sizes)},
    )


def _few(sizes: Transfer) -> int:
    return min(FEW, sizes.examples)


def _row(found: list[dict[str, float]], name: str, sizes: Transfer) -> dict[str, Any]:
    shares = [seed[name] for seed in found]
    examples = sizes.examples if name == TEACHERS else _few(sizes)
    return {
        "prompt": name,
        "examples": examples,
        "right": statistics.fmean(shares),
        "worst": min(shares),
        "best": max(shares),
    }


def _measure(model: LlamaForCausalLM, sizes: Transfer, seed: int, tick: Callable[[], None]) -> dict[str, float]:
    """Train everything with one seed. -> the share of right answers by prompt."""
    world = World(model, seed)
    tasks = [world.task() for _ in range(SOURCES)]
    many = [world.rows(task, sizes.examples) for task in tasks]
    tests = [world.rows(task, TESTS) for task in tasks]
    teachers = []
    for rows in many:
        teachers.append(teacher(model, rows, sizes, seed))
        tick()
    found = {TEACHERS: statistics.fmean(map(_taught, [model] * SOURCES, teachers, tests))}
    for name, given in ((ALONE, None), (TAUGHT, teachers)):
        found[name] = _multitask(model, given, many, tests, sizes, seed)
        tick()
    return found


def _taught(model: LlamaForCausalLM, rows: Tensor, test: Rows) -> float:
    """The share of right answers of a teacher alone."""
    with softhooks.attach(model, softhooks.PromptTuning(LENGTH, init="tensor", init_tensor=rows)):
        return right(model, test)


def _multitask(
    model: LlamaForCausalLM,
    teachers: list[Tensor] | None,
    many: list[Rows],
    tests: list[Rows],
    sizes: Transfer,
    seed: int,
) -> float:
    """Train a multitask prompt on the first few rows of each task."""
    rows = [
        {key: value[i] for key, value in task.items()} | {"task_ids": number}
        for number, task in enumerate(many)
        for i in range(_few(sizes))
    ]
    sampler = softhooks.TaskSampler([row["task_ids"] for row in rows], ROWS, weights="equal", seed=seed)
    torch.manual_seed(seed)
    method = softhooks.MultitaskPromptTuning(LENGTH, tasks=SOURCES, teachers=teachers)
    with softhooks.attach(model, method) as prompt:
        train(model, prompt, again(DataLoader(rows, ROWS, sampler=sampler)), sizes.source_steps, SOURCE_RATE)  # type: ignore[arg-type]
        return statistics.fmean(right(model, test, number) for number, test in enumerate(tests))
