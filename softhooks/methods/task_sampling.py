"""Stochastic task sampling of multitask prompt tuning: a sampler over the rows of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from softhooks.errors import OptionError, TrainerError, check_choice

WEIGHTS = ("size", "log", "capped", "equal")
CAP = 2**18
"""With `capped` weights, tasks with more rows than this are not drawn more often."""


class TaskSampler(Sampler[int]):
    """Samples batches of several tasks, with the same number of rows from each.

    For each batch n is drawn from U{2..K}, then n tasks with replacement, by weight. Each gives B // n rows, the last one also
    the remainder. The rows of a task come in shuffled order; after the last one they are shuffled again.

    In your own loop: `DataLoader(rows, batch_size=B, sampler=TaskSampler(task_of_each_row, B))`. An epoch has as many rows as the
    data set, and depends only on the seed and the number of the epoch, so a resumed run gets the same batches.

    Source: Wang et al. 2023, arXiv:2303.02861, and the authors' code. Differs: rows are shuffled again at each epoch, and after
    all rows of a task have been drawn.

    Args:
        tasks: the task of each row of the data set.
        batch_size: B, the batch size of the loader.
        weights: the probability of a task: `size`, proportional to its number of rows; `log`, to log(1 + size); `capped`, to
            min(size, 2^18); `equal`, the same for all.
        seed: the seed.

    Raises:
        OptionError: there are no rows, or an option is wrong.
    """

    def __init__(self, tasks: Sequence[int] | Tensor, batch_size: int, *, weights: str = "size", seed: int = 0) -> None:
        check_choice("weights", weights, WEIGHTS)
        if batch_size < 1 or not len(tasks):
            raise OptionError(f"there are {len(tasks)} rows and batch_size is {batch_size}; both must be 1 or more.")
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
        """Return the number of rows of the data set."""
        return sum(len(own) for own in self.rows.values())

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; accelerate and the Trainer call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Draw the rows of an epoch, batch by batch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        cursors = [_Cursor(own, generator) for own in self.rows.values()]
        left = len(self)
        while left:
            size = min(self.batch_size, left)
            for cursor, count in self._draw(cursors, size, generator):
                for _ in range(count):
                    yield cursor.next()
            left -= size
        self.epoch += 1

    def _draw(self, cursors: list[_Cursor], size: int, generator: Generator) -> list[tuple[_Cursor, int]]:
        """Draw the tasks of one batch, with the number of rows of each."""
        least = min(2, len(cursors))
        number = int(torch.randint(least, len(cursors) + 1, (), generator=generator))
        chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator).tolist()
        counts = [size // number] * number
        counts[-1] += size % number
        return [(cursors[task], count) for task, count in zip(chosen, counts, strict=True)]


class _Cursor:
    """Iterates over the rows of a task in shuffled order, without end."""

    def __init__(self, rows: list[int], generator: Generator) -> None:
        self._rows = rows
        self._generator = generator
        self._order: list[int] = []

    def next(self) -> int:
        if not self._order:
            self._order = torch.randperm(len(self._rows), generator=self._generator).tolist()
        return self._rows[self._order.pop()]


def task_column(rows: Any, name: str) -> list[int]:
    """Read the column of a data set with the task of each row."""
    try:
        whole = rows[name] if name in getattr(rows, "column_names", ()) else [row[name] for row in rows]
        return [int(value) for value in whole]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TrainerError(
            f"the data set has no column {name!r} with the task of each row.",
            f"Add a column {name!r} of whole numbers to the data set.",
            dataset=type(rows).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error
