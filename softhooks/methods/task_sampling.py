"""The sampler for multitask prompt tuning; each batch mixes rows of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from softhooks.errors import OptionError, TrainerError, check_choice

Weights = Literal["size", "log", "capped", "equal"]
CAP = 2**18
"""The size above which the `capped` weight of a task no longer grows."""


class TaskSampler(Sampler[int]):
    """Samples batches that mix several tasks.

    For each batch of B rows, the sampler draws a number n from 2 to the number of tasks, and then n tasks by weight, with
    replacement. Each of these tasks contributes B // n rows; the last one also contributes the remainder. The rows of a task are
    shuffled at the start of each epoch, and again when all have been drawn.

    In your own training loop, use `DataLoader(rows, batch_size=B, sampler=TaskSampler(task_of_each_row, B))`. An epoch has as
    many rows as the dataset. The batches depend only on the seed and the epoch's number, so a resumed run gets the same batches.

    Source: Wang et al. 2023, arXiv:2303.02861, and the authors' code. Differences: the authors shuffle the rows only once.

    Args:
        tasks: the task of each row of the dataset.
        batch_size: B, the batch size of the loader.
        weights: the weight of a task with n rows: n for `size`, log(1 + n) for `log`, min(n, 2^18) for `capped`, 1 for `equal`.
        seed: the random seed.

    Raises:
        OptionError: there are no rows, or an option is invalid.
    """

    def __init__(
        self, tasks: Sequence[int] | Tensor, batch_size: int, *, weights: Weights = "size", seed: int = 0
    ) -> None:
        check_choice("weights", weights, get_args(Weights))
        if batch_size < 1 or not len(tasks):
            raise OptionError(f"there are {len(tasks)} rows, and batch_size is {batch_size}; both must be 1 or more.")
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        rows: dict[int, list[int]] = {}
        for number, task in enumerate(tasks):
            rows.setdefault(int(task), []).append(number)
        self.rows = dict(sorted(rows.items()))
        sizes = torch.tensor([float(len(own)) for own in self.rows.values()], dtype=torch.float64)
        drawn = {
            "size": sizes,
            "log": (1 + sizes).log(),
            "capped": sizes.clamp(max=CAP),
            "equal": torch.ones_like(sizes),
        }
        self.weights = drawn[weights] / drawn[weights].sum()

    def __len__(self) -> int:
        """Return the number of rows of the dataset."""
        return sum(len(own) for own in self.rows.values())

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; accelerate and the Trainer call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Draw the rows of an epoch, batch by batch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = [_shuffled(own, generator) for own in self.rows.values()]
        for start in range(0, len(self), self.batch_size):
            size = min(self.batch_size, len(self) - start)
            number = int(torch.randint(min(2, len(shuffled)), len(shuffled) + 1, (), generator=generator))
            chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator).tolist()
            for task in chosen[:-1]:
                yield from islice(shuffled[task], size // number)
            yield from islice(shuffled[chosen[-1]], size // number + size % number)
        self.epoch += 1


def _shuffled(rows: list[int], generator: Generator) -> Iterator[int]:
    """Yield the rows of a task forever; each pass over them is in a new random order."""
    while True:
        for number in reversed(torch.randperm(len(rows), generator=generator).tolist()):
            yield rows[number]


def task_column(rows: Any, name: str) -> list[int]:
    """Return the task of each row of a dataset."""
    try:
        whole = rows[name] if name in getattr(rows, "column_names", ()) else [row[name] for row in rows]
        return [int(value) for value in whole]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TrainerError(
            f"the dataset has no column {name!r} with the task of each row.",
            f"Add a column {name!r} of whole numbers to the dataset.",
            dataset=type(rows).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error
