"""In which order rows of several tasks are drawn: the paper's stochastic task sampling, for a Trainer or a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from softhooks.errors import OptionError, TrainerError

if TYPE_CHECKING:
    from softhooks.method import Method

WEIGHTS = ("size", "log", "capped", "equal")
CAP = 2**18
"""Beyond so many rows a task is not drawn more often, if weights are `capped`."""


class TaskSampler(Sampler[int]):
    """Draw batches of several tasks: how many tasks, which, and then as many rows of each.

    For each batch n is drawn from U{2..K}, then n tasks with replacement, by weight; each gives batch // n rows, and the last
    what is left as well. A task's rows come in shuffled order, and in a new one once all have come.

    In a loop: `DataLoader(rows, batch_size=B, sampler=TaskSampler(task_of_each_row, B))`. An epoch has as many rows as the data
    set, and depends on the seed and its number alone; so a run that is resumed draws what it would have drawn.

    Source: Wang et al. 2023, arXiv:2303.02861, and the authors' code. Differs: a task's rows are shuffled anew when they have all
    come, and at each epoch.

    Args:
        tasks: the task of each row of the data set.
        batch_size: that of the loader, B.
        weights: how likely a task is drawn: `size`, proportional to its number of rows; `log`, to log(1 + size); `capped`, to
            min(size, 2^18); `equal`.
        seed: of all draws.

    Raises:
        OptionError: there are no rows, or an option is wrong.
    """

    def __init__(self, tasks: Sequence[int] | Tensor, batch_size: int, *, weights: str = "size", seed: int = 0) -> None:
        if weights not in WEIGHTS:
            raise OptionError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}; it is {weights!r}.")
        if batch_size < 1 or not len(tasks):
            raise OptionError(
                f"there must be rows and a batch_size of 1 or more; there are {len(tasks)}, {batch_size}."
            )
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
        """As many rows as the data set has."""
        return sum(len(own) for own in self.rows.values())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next; accelerate and the Trainer call this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Draw an epoch, batch by batch."""
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
        """Choose the tasks of one batch, and how many rows each gives."""
        least = min(2, len(cursors))
        number = int(torch.randint(least, len(cursors) + 1, (), generator=generator))
        chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator).tolist()
        counts = [size // number] * number
        counts[-1] += size % number
        return [(cursors[task], count) for task, count in zip(chosen, counts, strict=True)]


class _Cursor:
    """A task's rows in shuffled order, again and again."""

    def __init__(self, rows: list[int], generator: Generator) -> None:
        self._rows = rows
        self._generator = generator
        self._order: list[int] = []

    def next(self) -> int:
        if not self._order:
            self._order = torch.randperm(len(self._rows), generator=self._generator).tolist()
        return self._rows[self._order.pop()]


# --- in a Trainer -----------------------------------------------------------------------------------------------------


def arrange(loader: Any, method: Method, seed: int) -> Any:
    """Let a method order the rows of a Trainer's loader, in place of the random order that the Trainer gave it.

    Returns:
        the sampler, or None where the method leaves the order alone.

    Raises:
        TrainerError: the loader draws in an order that somebody else chose, or in none.
    """
    if not method.draws_rows:
        return None
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    present = getattr(batches, "sampler", None)
    if not isinstance(batches, BatchSampler) or not isinstance(present, (RandomSampler, TaskSampler)):
        raise TrainerError(
            "a method's own order of rows takes the place of the Trainer's random one.",
            "Leave the order to the Trainer (`sampling=None`), or train on a data set with a length, in random order.",
            method=method.kind,
            rows=type(getattr(loader, "dataset", loader)).__name__,
            order=type(present).__name__,
        )
    if isinstance(present, TaskSampler):
        return present
    batches.sampler = method.sampler(loader.dataset, batches.batch_size, seed)
    return batches.sampler


def column(rows: Any, name: str) -> list[int]:
    """One column of a data set of dictionaries, of one whole number a row.

    Raises:
        TrainerError: it has no such column.
    """
    try:
        whole = rows[name] if name in getattr(rows, "column_names", ()) else [row[name] for row in rows]
        return [int(value) for value in whole]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TrainerError(
            "a data set of several tasks must say the task of each row.",
            f"Add a column {name!r} of whole numbers to the data set.",
            dataset=type(rows).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error
