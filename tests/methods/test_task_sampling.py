"""The paper's task sampling: what is drawn and how often; a Trainer uses it, and a resumed run repeats it exactly."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from untouched import remove_all

from softhooks import (
    MultitaskPromptTuning,
    OptionError,
    SoftPromptCallback,
    TaskSampler,
    TrainerError,
    UnsupportedModeError,
)
from softhooks.methods.task_sampling import CAP
from softhooks.trainer.batches import use_sampler

SIZES = [60, 30, 10, 20]
TASKS = [task for task, size in enumerate(SIZES) for _ in range(size)]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def batches(sampler: TaskSampler, epochs: int = 1) -> list[list[int]]:
    drawn = []
    for _ in range(epochs):
        rows = list(sampler)
        drawn += [rows[start : start + sampler.batch_size] for start in range(0, len(rows), sampler.batch_size)]
    return drawn


# --- what is drawn ----------------------------------------------------------------------------------------------------


def distribution(weights: list[float], size: int) -> dict[tuple[int, ...], float]:
    """The probability of each batch composition, by enumerating all draws."""
    likely: Counter[tuple[int, ...]] = Counter()
    tasks, total = range(len(weights)), sum(weights)
    numbers = range(min(2, len(weights)), len(weights) + 1)
    for number in numbers:
        for drawn in itertools.product(tasks, repeat=number):
            counts = [size // number * drawn.count(task) for task in tasks]
            counts[drawn[-1]] += size % number
            chance = math.prod(weights[task] / total for task in drawn) / len(numbers)
            likely[tuple(counts)] += chance
    return likely


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_batch_has_equal_parts_and_a_remainder(sizes: list[int], size: int, seed: int) -> None:
    tasks = [task for task, count in enumerate(sizes) for _ in range(count)]
    sampler = TaskSampler(tasks, size, seed=seed)
    drawn = batches(sampler)
    assert sum(map(len, drawn)) == len(tasks) == len(sampler)
    assert [len(batch) for batch in drawn[:-1]] == [size] * (len(drawn) - 1)
    for batch in drawn:
        counts = Counter(tasks[row] for row in batch)
        assert tuple(counts[task] for task in range(len(sizes))) in distribution([1.0] * len(sizes), len(batch))


@pytest.mark.parametrize("size", [12, 13, 3])
@pytest.mark.parametrize("weights", ["size", "equal"])
def test_the_statistics_of_batches(weights: str, size: int) -> None:
    """Every possible batch (number of tasks, which tasks, which one gives the remainder) has its expected frequency."""
    sampler = TaskSampler(TASKS, size, weights=weights, seed=3)
    drawn = [batch for batch in batches(sampler, epochs=400) if len(batch) == size]
    seen = Counter(tuple(Counter(TASKS[row] for row in batch)[task] for task in range(4)) for batch in drawn)
    expected = distribution([float(size) for size in SIZES] if weights == "size" else [1.0] * 4, size)
    assert set(seen) <= set(expected)
    for counts, chance in expected.items():
        assert abs(seen[counts] / len(drawn) - chance) < 4.5 * math.sqrt(chance * (1 - chance) / len(drawn)), counts


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("size", [60, 30, 10, 20]),
        ("log", [torch.tensor(1.0 + size).log().item() for size in SIZES]),
        ("capped", [60, 30, 10, 20]),
        ("equal", [1, 1, 1, 1]),
    ],
)
def test_tasks_are_drawn_by_weight(weights: str, expected: list[float]) -> None:
    sampler = TaskSampler(TASKS, 12, weights=weights, seed=3)
    counts = Counter(TASKS[row] for batch in batches(sampler, epochs=400) for row in batch)
    total = sum(counts.values())
    for task, weight in enumerate(expected):
        assert abs(counts[task] / total - weight / sum(expected)) < 0.02


def test_a_large_task_is_capped() -> None:
    tasks = torch.cat([torch.zeros(3 * CAP), torch.ones(CAP)]).long()
    assert TaskSampler(tasks, 8, weights="capped").weights.tolist() == [0.5, 0.5]
    assert TaskSampler(tasks, 8, weights="size").weights.tolist() == [0.75, 0.25]


def test_cursors_wrap_in_shuffled_order() -> None:
    sampler = TaskSampler([0] * 3 + [1] * 27, 6, weights="equal")
    drawn = [row for row in sampler if row < 3]
    assert len(drawn) > 6
    for start in range(0, len(drawn) - 2, 3):
        assert sorted(drawn[start : start + 3]) == [0, 1, 2], "every row once before one comes again"
    assert len({tuple(drawn[start : start + 3]) for start in range(0, len(drawn) - 2, 3)}) > 1


def test_an_epoch_depends_on_the_seed_and_its_number_alone() -> None:
    one, other = TaskSampler(TASKS, 8, seed=5), TaskSampler(TASKS, 8, seed=5)
    first, second = list(one), list(one)
    assert first != second
    other.set_epoch(1)
    assert list(other) == second
    other.set_epoch(0)
    assert list(other) == first
    assert list(TaskSampler(TASKS, 8, seed=6)) != first


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    list(TaskSampler(TASKS, 8))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("tasks", "size", "weights"), [([], 4, "size"), ([0, 1], 0, "size"), ([0, 1], 4, "square")], ids=str
)
def test_wrong_options_are_refused(tasks: list[int], size: int, weights: str) -> None:
    with pytest.raises(OptionError, match="must be"):
        TaskSampler(tasks, size, weights=weights)


def test_in_a_loop_of_ones_own() -> None:
    loader = DataLoader(TASKS, batch_size=8, sampler=TaskSampler(TASKS, 8))
    assert sum(len(batch) for batch in loader) == len(TASKS)


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class Watch(tf.TrainerCallback):
    """Note the tasks of every batch, by a hook on the model."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        encoder = kwargs["model"].soft_prompt["default"]["encoder"]
        choose = type(encoder).choose_variants

        def noting(given: Any, batch: int) -> Any:
            if encoder.training:
                self.seen.append(given["task_ids"].tolist())
            return choose(encoder, given, batch)

        encoder.choose_variants = noting


def task_rows(count: int = 24, tasks: int = 3) -> list[dict[str, torch.Tensor]]:
    rows = training.rows("causal", count)
    for number, row in enumerate(rows):
        row["task_ids"] = torch.tensor(number % tasks)
    return rows


def trainer_of(folder: Path, watch: Watch, data: Any = None, sampling: str | None = "equal", **options: Any) -> Any:
    method = MultitaskPromptTuning(3, tasks=3, sampling=sampling)
    trainer, callback = training.prompted(folder, zoo.build("llama"), "causal", method, watch, **options)
    trainer.train_dataset = task_rows() if data is None else data
    return trainer, callback


def expected_batches(epochs: int, seed: int = 1, size: int = 4) -> list[list[int]]:
    tasks = [number % 3 for number in range(24)]
    sampler = TaskSampler(tasks, size, weights="equal", seed=seed)
    return [[tasks[row] for row in batch] for batch in batches(sampler, epochs)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_draws_as_the_sampler_does(tmp_path: Path, workers: int) -> None:
    watch = Watch()
    trainer, _ = trainer_of(tmp_path, watch, max_steps=15, dataloader_num_workers=workers)
    trainer.train()
    assert watch.seen == expected_batches(3)[:15]


def test_the_data_seed_counts(tmp_path: Path) -> None:
    watch = Watch()
    trainer_of(tmp_path, watch, max_steps=6, data_seed=9)[0].train()
    assert watch.seen == expected_batches(1, seed=9)


@pytest.mark.parametrize("stop", [2, 6, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path, stop: int, workers: int) -> None:
    """Stopped within an epoch of 6 steps, at its end, and in the next."""
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": stop,
        "max_steps": 14,
        "dataloader_num_workers": workers,
    }
    whole, resumed = Watch(), Watch()
    trainer, callback = trainer_of(tmp_path, whole, **options)
    trainer.train()
    again, other = trainer_of(tmp_path, resumed, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert whole.seen == expected_batches(3)[:14]
    assert resumed.seen == whole.seen[stop:]
    assert training.equal(training.trained(other), training.trained(callback))
    assert training.losses(again) == training.losses(trainer)


def test_with_gradient_accumulation_and_a_last_batch_that_is_smaller(tmp_path: Path) -> None:
    watch = Watch()
    options: dict[str, Any] = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    trainer, _ = trainer_of(tmp_path, watch, num_train_epochs=2, max_steps=-1, **options)
    trainer.train()
    assert watch.seen == expected_batches(2, size=5)
    assert {len(batch) for batch in watch.seen} == {5, 4}


def test_the_trainers_own_order_is_an_option(tmp_path: Path) -> None:
    watch = Watch()
    trainer, _ = trainer_of(tmp_path, watch, sampling=None, max_steps=6)
    trainer.train()
    assert Counter(task for batch in watch.seen for task in batch) == {0: 8, 1: 8, 2: 8}
    assert watch.seen != expected_batches(1)


def test_one_task_leaves_the_order_alone(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer, _ = training.prompted(tmp_path, model, "causal", MultitaskPromptTuning(3, tasks=1), max_steps=2)
    trainer.train()
    assert not isinstance(trainer.callback_handler.train_dataloader.batch_sampler.sampler, TaskSampler)


def test_an_order_that_somebody_chose_is_not_replaced(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, Watch(), max_steps=2)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    with pytest.raises(TrainerError, match=r"(?s)SequentialSampler.*sampling=None"):
        trainer.train()


def test_a_task_sampler_of_ones_own_is_kept(tmp_path: Path) -> None:
    watch = Watch()
    trainer, _ = trainer_of(tmp_path, watch, max_steps=6)
    own = TaskSampler([number % 3 for number in range(24)], 4, weights="log", seed=77)
    expected = list(own)
    trainer._get_train_sampler = lambda dataset=None: own
    trainer.train()
    assert watch.seen == [[row % 3 for row in expected[start : start + 4]] for start in range(0, 24, 4)]


def test_a_stream_of_rows_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(task_rows())

    trainer, _ = trainer_of(tmp_path, Watch(), data=Stream(), max_steps=2)
    with pytest.raises(TrainerError, match=r"rows: +Stream"):
        trainer.train()
    watch = Watch()
    trainer_of(tmp_path, watch, data=Stream(), sampling=None, max_steps=2)[0].train()
    assert watch.seen == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_a_data_set_without_tasks_is_refused(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, Watch(), data=training.rows("causal"), max_steps=2)
    with pytest.raises(TrainerError, match=r"(?s)KeyError.*task_ids"):
        trainer.train()


def test_a_data_set_with_a_task_too_many_is_refused(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, Watch(), data=task_rows(tasks=4), max_steps=2)
    with pytest.raises(UnsupportedModeError, match="task ids: 3"):
        trainer.train()


def test_the_epoch_is_told_also_where_a_resumed_loader_hides_the_sampler() -> None:
    """Of what accelerate wraps around a batch sampler in several processes, its own `set_epoch` reaches two layers only."""
    rows = task_rows()
    sampler = TaskSampler([number % 3 for number in range(24)], 4)
    shard = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes=2, process_index=0)
    loader = DataLoaderShard(rows, batch_sampler=SkipBatchSampler(shard, skip_batches=1))
    loader.set_epoch(3)
    assert sampler.epoch == 0
    callback = SoftPromptCallback(MultitaskPromptTuning(3, tasks=3))
    callback._sampler = sampler
    for epoch in (3, 2.0, 4 - 1e-9):
        callback.on_epoch_begin(None, tf.TrainerState(epoch=epoch), None)
        assert sampler.epoch == round(epoch)


def test_several_processes_share_the_batches(tmp_path: Path) -> None:
    rows = task_rows()
    method = MultitaskPromptTuning(3, tasks=3, sampling="equal")
    found: list[list[list[int]]] = []
    for rank in range(2):
        inner = BatchSampler(RandomSampler(rows), 4, drop_last=False)
        loader = DataLoader(rows, batch_sampler=BatchSamplerShard(inner, num_processes=2, process_index=rank))
        assert use_sampler(loader, method, 1) is inner.sampler
        found.append([[row % 3 for row in batch] for batch in loader.batch_sampler])
    assert [batch for pair in zip(*found, strict=True) for batch in pair] == expected_batches(1)
