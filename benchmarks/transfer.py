"""How much source tasks, their decomposition and teachers help a target task with few examples, on toy tasks (see `tasks`).

Four prompts learn each target from the same examples, in the same number of steps; each takes the better of two learning
rates. One starts from scratch. Three have seen the source tasks before, in the same batches: one prompt for all of them,
without u and v, which shows how much transfer alone helps; and two multitask prompts, one of them with teachers: vanilla
prompts of each task, trained on the same rows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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
from softhooks.method import Method

SOURCES, TARGETS = 8, 4
SOURCE_RATE, TEACHER_RATE, TARGET_RATES = 2e-2, 3e-2, (1e-2, 3e-2)
ROWS = 64
TESTS = 256
GAIN = 0.05
"""How much higher the share of right answers must be than that of a prompt from scratch."""

DECOMPOSED, DECOMPOSED_SOURCES = 0.02, 0.3
"""How much higher multitask prompts' share must be than that of one prompt for all sources, on targets and on the sources."""

SCRATCH, SHARED, ALONE, TAUGHT = "prompt from scratch", "one prompt of all sources", "MPT", "MPT with teachers"
EVERYONE = (SCRATCH, SHARED, ALONE, TAUGHT)

COLUMNS = (
    Column("prompt", "{prompt}"),
    Column("examples", "{shots}"),
    Column("right on targets", "{right:.1%}"),
    Column("worst and best seed", "{worst:.1%} to {best:.1%}"),
    Column("learning rate", "{rate:g}"),
    Column("right on sources", "{sources:.1%}"),
    Column("bare model", "{bare:.1%}"),
)

Found = dict[tuple[str, int, float], float]
"""The share of right answers by prompt, number of examples and learning rate; with 0 examples, on the sources."""


def run(profile: Profile, progress: Progress) -> Result:
    """Train sources and targets with several seeds, and count right answers on new rows."""
    sizes = profile.transfer
    task = progress.add_task("transfer", total=sizes.seeds * (SOURCES + 3 + 4 * len(sizes.shots)))
    with one_thread():
        model = frozen_model(profile.seed)
        found = [_measure(model, sizes, profile.seed + i, lambda: progress.advance(task)) for i in range(sizes.seeds)]
    rows = [_row(found, name, shots) for shots in sizes.shots for name in EVERYONE]
    return Result(
        name="transfer",
        title="Few examples of a target task: a prompt from scratch, and prompts that have seen source tasks",
        explanation=(
            f"Right answers on {TESTS} new rows of each of {TARGETS} target tasks, the mean of {sizes.seeds} seeds; {SOURCES} "
            f"source tasks with {sizes.examples} rows each; {LENGTH} virtual tokens; {sizes.target_steps} steps on a target."
        ),
        columns=COLUMNS,
        rows=rows,
        targets=_targets(rows),
        settings=vars(sizes),
    )


def _row(found: list[Found], name: str, shots: int) -> dict[str, Any]:
    means = {rate: statistics.fmean(seed[name, shots, rate] for seed in found) for rate in TARGET_RATES}
    rate = max(means, key=lambda rate: means[rate])
    row = {
        "prompt": name,
        "shots": shots,
        "rate": rate,
        "right": means[rate],
        "worst": min(seed[name, shots, rate] for seed in found),
        "best": max(seed[name, shots, rate] for seed in found),
        "bare": statistics.fmean(seed["bare", 0, 0.0] for seed in found),
    }
    if name != SCRATCH:
        row["sources"] = statistics.fmean(seed[name, 0, SOURCE_RATE] for seed in found)
    return row


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    right_of = {(row["prompt"], row["shots"]): row["right"] for row in rows}
    compared = ((TAUGHT, SCRATCH, GAIN), (ALONE, SHARED, DECOMPOSED))
    on_sources = {row["prompt"]: row["sources"] for row in rows if "sources" in row}
    return [
        Target(
            f"{better}, {shots} examples: right answers less those of {other}",
            right_of[better, shots] - right_of[other, shots],
            "at least",
            bound,
        )
        for better, other, bound in compared
        for shots in dict.fromkeys(row["shots"] for row in rows)
    ] + [
        Target(
            f"{ALONE}, on sources: right answers less those of {SHARED}",
            on_sources[ALONE] - on_sources[SHARED],
            "at least",
            DECOMPOSED_SOURCES,
        )
    ]


def _measure(model: LlamaForCausalLM, sizes: Transfer, seed: int, tick: Callable[[], None]) -> Found:
    """Train everything with one seed."""
    world = World(model, seed)
    sources = [world.rows(world.task(), sizes.examples) for _ in range(SOURCES)]
    targets = [world.task() for _ in range(TARGETS)]
    tests = [world.rows(task, TESTS) for task in targets]
    teachers = []
    for rows in sources:
        teachers.append(teacher(model, rows, sizes, seed))
        tick()
    found: Found = {("bare", 0, 0.0): statistics.fmean(right(model, test) for test in tests)}
    with tempfile.TemporaryDirectory() as folder:
        methods: dict[str, Method] = {
            SHARED: softhooks.PromptTuning(LENGTH),
            ALONE: softhooks.MultitaskPromptTuning(LENGTH, tasks=SOURCES),
            TAUGHT: softhooks.MultitaskPromptTuning(LENGTH, tasks=SOURCES, teachers=teachers),
        }
        for name, method in methods.items():
            found[name, 0, SOURCE_RATE] = _source(model, method, sources, sizes, seed, Path(folder) / name)
            tick()
        for shots in sizes.shots:
            few = [world.rows(task, shots) for task in targets]
            for name in EVERYONE:
                start = _start(name, Path(folder) / name)
                for rate in TARGET_RATES:
                    found[name, shots, rate] = _target(model, start, few, tests, sizes.target_steps, rate, seed)
                tick()
    return found


def teacher(model: LlamaForCausalLM, rows: Rows, sizes: Transfer, seed: int) -> Tensor:
    """Train a vanilla prompt. -> [P, H]."""
    torch.manual_seed(seed)
    with softhooks.attach(model, softhooks.PromptTuning(LENGTH)) as prompt:
        train(model, prompt, _batches(rows, sizes.teacher_steps, seed), sizes.teacher_steps, TEACHER_RATE)
        return prompt.embeddings().detach().clone()


def _source(
    model: LlamaForCausalLM, method: Method, sources: list[Rows], sizes: Transfer, seed: int, folder: Path
) -> float:
    """Train a prompt on the sources, with the task of each row if it takes one, and save it. -> the share of right answers."""
    told = [{"task_ids": number} if "task_ids" in method.columns else {} for number in range(SOURCES)]
    tasks = [number for number in range(SOURCES) for _ in range(sizes.examples)]
    rows = [
        {key: value[i % sizes.examples] for key, value in sources[number].items()} | told[number]
        for i, number in enumerate(tasks)
    ]
    sampler = softhooks.TaskSampler(tasks, ROWS, weights="equal", seed=seed)
    torch.manual_seed(seed)
    with softhooks.attach(model, method) as prompt:
        batches = again(DataLoader(rows, ROWS, sampler=sampler))  # type: ignore[arg-type]
        train(model, prompt, batches, sizes.source_steps, SOURCE_RATE)
        prompt.save_pretrained(folder)
        return statistics.fmean(right(model, task, **given) for task, given in zip(sources, told, strict=True))


def _start(name: str, source: Path) -> Method:
    """The prompt of a target task before training."""
    if name == SHARED:
        return softhooks.PromptTuning(LENGTH, init="prompt", init_from=source)
    return softhooks.MultitaskPromptTuning(LENGTH, tasks=1, source=None if name == SCRATCH else source)


def _target(
    model: LlamaForCausalLM, start: Method, few: list[Rows], tests: list[Rows], steps: int, rate: float, seed: int
) -> float:
    """Train a prompt for each target task. -> the share of right answers."""
    shares = []
    for rows, test in zip(few, tests, strict=True):
        torch.manual_seed(seed)
        with softhooks.attach(model, start) as prompt:
            train(model, prompt, _batches(rows, steps, seed), steps, rate)
            shares.append(right(model, test))
    return statistics.fmean(shares)


def train(
    model: LlamaForCausalLM, prompt: softhooks.SoftPrompt, batches: Iterator[Any], steps: int, rate: float
) -> None:
    """Train with AdamW and a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(steps):
        model(**next(batches)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _batches(rows: Rows, steps: int, seed: int) -> Iterator[Rows]:
    """Draw batches of one task, at most half of `ROWS` each."""
    generator, count = torch.Generator().manual_seed(seed), len(rows["input_ids"])
    for _ in range(steps):
        chosen = torch.randperm(count, generator=generator)[: ROWS // 2]
        yield {key: value[chosen] for key, value in rows.items()}


def again(loader: Iterable[Any]) -> Iterator[Any]:
    """Repeat a loader's batches forever."""
    while True:
        yield from loader


@torch.no_grad()
def right(model: LlamaForCausalLM, rows: Rows, task_ids: int | None = None) -> float:
    """The share of a task's answers that a model gives too, in evaluation mode."""
    given = {} if task_ids is None else {"task_ids": torch.full((len(rows["input_ids"]),), task_ids)}
    logits = model.eval()(rows["input_ids"], **given).logits
    return float((logits[:, :-1].argmax(-1) == rows["labels"][:, 1:]).float().mean())
