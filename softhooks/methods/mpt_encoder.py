"""The encoders of multitask prompt tuning: one that trains, one that trains its teachers first, and what is saved of them.

Names: K tasks, P virtual tokens, H width, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from softhooks.compat.sharding import full
from softhooks.encoder import EMBEDDINGS, PromptEncoder, TableEncoder, require
from softhooks.errors import UnsupportedModeError

TASK_IDS = "task_ids"
"""The column of a batch that says each row's task."""


def product(shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One task's prompt, P* o (u v^T). [P, H], [P, r], [H, r] -> [P, H].

    Summed by hand: a matrix product may be computed in fewer bits, by a setting that is not ours.
    """
    return shared * (left[:, None, :] * right[None, :, :]).sum(-1)


def chosen(given: dict[str, Tensor], batch: int, names: Sequence[str]) -> list[int]:
    """Each row's task. With one task nobody has to name it.

    Raises:
        UnsupportedModeError: there are several and the call does not say which; or the ids are no whole numbers.
    """
    if len(names) == 1 and TASK_IDS not in given:
        return [0] * batch
    ids = require(given, TASK_IDS, f"it has {len(names)} tasks: {', '.join(names)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UnsupportedModeError(f"{TASK_IDS} must be whole numbers, 0 to {len(names) - 1}; they are {ids.dtype}.")
    return [int(number) for number in ids.reshape(-1).tolist()]


def are_tasks(tasks: object) -> bool:
    """Whether these are different names of tasks, or a number of 1 or more."""
    if isinstance(tasks, tuple):
        return bool(tasks) and all(isinstance(name, str) and name for name in tasks) and len(set(tasks)) == len(tasks)
    return isinstance(tasks, int) and not isinstance(tasks, bool) and tasks > 0


def check_task(number: int, names: Sequence[str]) -> int:
    """Check a task that a row of this prompt asks for.

    Raises:
        UnsupportedModeError: there is none of that number.
    """
    if not 0 <= number < len(names):
        raise UnsupportedModeError(
            "a row's task must be one of the prompt's.",
            "Number the tasks in the order in which the method names them.",
            task_ids=number,
            tasks=", ".join(f"{i}: {name}" for i, name in enumerate(names)),
        )
    return number


class MultitaskEncoder(PromptEncoder):
    """A shared prompt P* and, for each task, vectors that scale its rows and columns: `P_k = P* o (u_k v_k^T)`.

    Trained are P* and the distance of u and v from their start, in units of `rate`: `u = 1 + rate * left`. So weight decay
    pulls u and v to 1, and an optimizer that makes steps of one size for all (Adam and its kin) moves them `rate` times as fast
    as P*: two learning rates in one group. With a rank above 1 the further columns of u and v are decayed to 0 instead, for the
    product to stay ones.

    Variant k is task k; variant K + k is what its teacher says, if there are teachers.

    Args:
        names: of the tasks, K.
        shared: P*, [P, H].
        left, right: u [K, P, r] and v [K, H, r] to start from.
        rate: how much faster u and v move than P*.
        teachers: frozen prompts of the tasks, [K, P, H].
    """

    groups = (EMBEDDINGS,)
    teachers: Tensor | None
    center: Tensor

    def __init__(
        self,
        names: Sequence[str],
        shared: Tensor,
        left: Tensor,
        right: Tensor,
        rate: float,
        teachers: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.rate = rate
        self.is_teaching = False
        center = torch.zeros(left.shape[-1])
        center[0] = 1
        self.register_buffer("center", center, persistent=False)
        self.register_buffer("teachers", None if teachers is None else teachers.detach().float().clone())
        self.shared = nn.Parameter(shared.detach().float().clone())
        self.left = nn.Parameter((left.detach().float() - center) / rate)
        self.right = nn.Parameter((right.detach().float() - center) / rate)

    @property
    def is_learning_from_scratch(self) -> bool:
        """Whether the teachers themselves are trained now."""
        return False

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The tasks' u [K, P, r] and v [K, H, r]."""
        return self.center + self.rate * self.left, self.center + self.rate * self.right

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one task's prompt, or its teacher's, [P, H]."""
        count = len(self.names)
        if count <= variant < 2 * count and self.teachers is not None:
            return self.taught(variant - count)
        task = check_task(variant if variant < 2 * count else variant - count, self.names)
        return product(
            self.shared, self.center + self.rate * self.left[task], self.center + self.rate * self.right[task]
        )

    def taught(self, task: int) -> Tensor:
        """The prompt of a task's teacher, [P, H]."""
        assert self.teachers is not None
        return self.teachers[task]

    def choose(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose each row's task, or its teacher; a number that is no task's stays none, until a row of this prompt has it."""
        count = len(self.names)
        teach = self.is_teaching or (self.training and self.is_learning_from_scratch)
        return [
            task + count if task >= count or (teach and task >= 0) else task
            for task in chosen(given, batch, self.names)
        ]

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Let the teachers speak."""
        before, self.is_teaching = self.is_teaching, True
        try:
            yield
        finally:
            self.is_teaching = before

    def folded(self) -> dict[str, Tensor]:
        """One task: its prompt, [P, H]. Several: P*, and u and v of all tasks, stacked, [K * P, r] and [K * H, r]."""
        if len(self.names) == 1:
            return super().folded()
        with self._at_rest():
            left, right = self.vectors()
            tables = {"shared": self.shared, "left": left.flatten(0, 1), "right": right.flatten(0, 1)}
            return {name: table.detach().float().clone() for name, table in tables.items()}


class LearningEncoder(MultitaskEncoder):
    """Train a vanilla prompt for each task first; after so many steps they are the teachers.

    Args:
        names, shared, left, right, rate: as for the other.
        start: what the vanilla prompts start from, [K, P, H].
        steps: for how many steps of the optimizer they train.
    """

    is_constrained = True
    taken: Tensor

    def __init__(
        self, names: Sequence[str], shared: Tensor, left: Tensor, right: Tensor, rate: float, start: Tensor, steps: int
    ) -> None:
        super().__init__(names, shared, left, right, rate, teachers=start)
        self.steps = steps
        self.vanilla = nn.Parameter(start.detach().float().clone())
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    @property
    def is_learning_from_scratch(self) -> bool:
        """Whether the teachers themselves are trained now."""
        return int(self.taken) < self.steps

    def taught(self, task: int) -> Tensor:
        """The prompt that shall be the task's teacher, while it trains; then the teacher, which no optimizer moves."""
        return self.vanilla[task] if self.is_learning_from_scratch else super().taught(task)

    def constrain(self) -> None:
        """Count the steps; after the last one keep the prompts as teachers."""
        if not self.is_learning_from_scratch:
            return
        self.taken += 1
        if int(self.taken) == self.steps and self.teachers is not None:
            self.teachers.copy_(full(self.vanilla))


class FoldedTasks(PromptEncoder):
    """Several tasks as they are saved: P* [P, H], u [K * P, r], v [K * H, r]; each task's prompt is what it was, bit for bit."""

    groups = (EMBEDDINGS,)

    def __init__(self, names: Sequence[str], tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.shared = nn.Parameter(tables["shared"].detach().float().clone())
        self.left = nn.Parameter(tables["left"].detach().float().clone())
        self.right = nn.Parameter(tables["right"].detach().float().clone())

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one task's prompt, [P, H]."""
        task = check_task(variant, self.names)
        left, right = (table.unflatten(0, (len(self.names), -1)) for table in (self.left, self.right))
        return product(self.shared, left[task], right[task])

    def choose(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose each row's task."""
        return chosen(given, batch, self.names)

    def folded(self) -> dict[str, Tensor]:
        """The tables themselves."""
        return {name: table.detach().float().clone() for name, table in self.named_parameters()}


class FoldedTask(TableEncoder):
    """One task as it is saved: its prompt, [P, H]."""

    def __init__(self, name: str, tables: dict[str, Tensor]) -> None:
        super().__init__(tables)
        self.names = (name,)

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the parameter itself, [P, H]."""
        return super().forward(group, check_task(variant, self.names))

    def choose(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose the one task; another is refused."""
        return chosen(given, batch, self.names)
