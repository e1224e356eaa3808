"""The sampler of a method in a Trainer's data loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch.utils.data import DataLoader, Sampler

from softhooks import PromptTuning, TrainerError
from softhooks.trainer.batches import use_sampler


class Backward(Sampler[int]):
    """The last row first."""

    def __init__(self, rows: Any) -> None:
        self.count = len(rows)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count - 1, -1, -1))


@dataclass(frozen=True)
class BackwardTuning(PromptTuning):
    sampler_class: ClassVar[type[Any]] = Backward

    @property
    def has_sampler(self) -> bool:
        return True

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Backward:
        return Backward(rows)


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_the_sampler_of_any_method_replaces_the_random_one_once() -> None:
    loader: Any = DataLoader([10, 11, 12], batch_size=2, shuffle=True)
    sampler = use_sampler(loader, BackwardTuning(2), seed=0)
    assert batches(loader) == [[12, 11], [10]]
    assert use_sampler(loader, BackwardTuning(2), seed=0) is sampler, "a second run of the Trainer keeps it"


def test_a_method_without_a_sampler_leaves_the_loader_unchanged() -> None:
    loader: Any = DataLoader([10, 11, 12], batch_size=2)
    assert use_sampler(loader, PromptTuning(2), seed=0) is None
    assert batches(loader) == [[10, 11], [12]]


def test_a_sampler_that_the_user_chose_is_refused() -> None:
    loader: Any = DataLoader([10, 11, 12], batch_size=2)
    with pytest.raises(TrainerError, match=r"the data loader uses a SequentialSampler(.|\n)*sampling=None"):
        use_sampler(loader, BackwardTuning(2), seed=0)
