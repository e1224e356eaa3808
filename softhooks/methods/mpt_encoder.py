"""The encoders of multitask prompt tuning, for K tasks, P virtual tokens, hidden size H and rank r."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from softhooks.compat.sharding import full
from softhooks.errors import UnsupportedModeError, is_int
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder, TableEncoder, require_column

TASK_IDS = "task_ids"
"""The batch column with the task of each row."""


def product(shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute one task's prompt, P* o (u v^T). [P, H], [P, r], [H, r] -> [P, H]."""
    # Not a matrix product, which may use a lower precision such as TF32.
    return shared * (left[:, None, :] * right[None, :, :]).sum(-1)


def task_of_rows(given: dict[str, Tensor], batch: int, names: Sequence[str]) -> list[int]:
    """Return each row's task. If the prompt has only one task, the batch column `task_ids` may be missing."""
    if len(names) == 1 and TASK_IDS not in given:
        return [0] * batch
    ids = require_column(given, TASK_IDS, f"the prompt has {len(names)} tasks: {', '.join(names)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UnsupportedModeError(
            f"{TASK_IDS} has type {ids.dtype}; it must contain whole numbers from 0 to {len(names) - 1}."
        )
    return [int(number) for number in ids.reshape(-1).tolist()]


MAX_TASKS = 2**16
"""The largest number of tasks without names."""


def are_tasks(tasks: object) -> bool:
    """Return whether `tasks` is a tuple of distinct names, or an integer from 1 to `MAX_TASKS`."""
    if isinstance(tasks, tuple):
        return bool(tasks) and all(isinstance(name, str) and name for name in tasks) and len(set(tasks)) == len(tasks)
    return is_int(tasks, 1) and not is_int(tasks, MAX_TASKS + 1)


def check_task(number: int, names: Sequence[str]) -> int:
    """Check that a task exists, and return its number."""
    if not 0 <= number < len(names):
        raise UnsupportedModeError(
            f"a row has the task {number}, which the prompt does not have.",
            "Number the tasks from 0, in the order of the method's `tasks`.",
            task_ids=number,
            tasks=", ".join(f"{i}: {name}" for i, name in enumerate(names)),
        )
    return number


class MultitaskEncoder(PromptEncoder):
    """Computes `P_k = P* o (u_k v_k^T)`.

    The parameters are P*, `left` and `right`, where u = 1 + rate * left and v = 1 + rate * right. So weight decay pulls u and v
    toward 1, and Adam, whose step size does not depend on the gradient's scale, changes them `rate` times as fast as P*. This
    gives two learning rates in one parameter group. If r > 1, the 1 is added only to the first column of u and of v, so that
    weight decay pulls u v^T toward a matrix of ones.

    The encoder computes several variants of the prompt: 0 to K - 1 are the prompts of the tasks, and K to 2K - 1 those of their
    teachers, if there are any.

    Args:
        names: the names of the tasks.
        shared: the initial P*, [P, H].
        left, right: the initial u [K, P, r] and v [K, H, r].
        rate: the factor `rate` above.
        teachers: the frozen prompt of each task's teacher, [K, P, H].
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
    def trains_teachers(self) -> bool:
        """Whether this step trains the teachers."""
        return False

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Compute u [K, P, r] and v [K, H, r] of all tasks."""
        return self.center + self.rate * self.left, self.center + self.rate * self.right

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the prompt of one task or of its teacher, [P, H]."""
        count = len(self.names)
        if count <= variant < 2 * count and self.teachers is not None:
            return self.teacher(variant - count)
        task = check_task(variant if variant < 2 * count else variant - count, self.names)
        return product(
            self.shared, self.center + self.rate * self.left[task], self.center + self.rate * self.right[task]
        )

    def teacher(self, task: int) -> Tensor:
        """Return the prompt of one teacher, [P, H]."""
        assert self.teachers is not None
        return self.teachers[task]

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose each row's task, or its teacher."""
        # Numbers out of range stay out of range, because other prompts may have these tasks; `forward` refuses them.
        count = len(self.names)
        teach = self.is_teaching or (self.training and self.trains_teachers)
        return [
            task + count if task >= count or (teach and task >= 0) else task
            for task in task_of_rows(given, batch, self.names)
        ]

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Use the teachers' prompts inside the `with` block."""
        before, self.is_teaching = self.is_teaching, True
        try:
            yield
        finally:
            self.is_teaching = before

    def folded(self) -> dict[str, Tensor]:
        """Return the prompt of a single task, [P, H], or for several tasks P* [P, H], u [K * P, r] and v [K * H, r]."""
        if len(self.names) == 1:
            return super().folded()
        with self._inference():
            left, right = self.vectors()
            tables = {"shared": self.shared, "left": left.flatten(0, 1), "right": right.flatten(0, 1)}
            return {name: table.detach().float().clone() for name, table in tables.items()}


class TeacherTrainingEncoder(MultitaskEncoder):
    """First trains one teacher for each task, and then P*, u and v.

    Args:
        names, shared, left, right, rate: as in `MultitaskEncoder`.
        start: the initial prompts of the teachers, [K, P, H].
        steps: the number of optimizer steps that train the teachers.
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
    def trains_teachers(self) -> bool:
        """Whether this step trains the teachers."""
        return int(self.taken) < self.steps

    def teacher(self, task: int) -> Tensor:
        """Return a teacher: the parameter while it is being trained, then its copy in the buffer, which no optimizer changes."""
        return self.vanilla[task] if self.trains_teachers else super().teacher(task)

    def constrain(self) -> None:
        """Count the steps that train the teachers; after the last one, copy the trained teachers to the buffer of frozen ones."""
        if not self.trains_teachers:
            return
        self.taken += 1
        if int(self.taken) == self.steps and self.teachers is not None:
            self.teachers.copy_(full(self.vanilla))


class FoldedTasks(PromptEncoder):
    """A folded prompt of several tasks: P* [P, H], u [K * P, r] and v [K * H, r]."""

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

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose each row's task."""
        return task_of_rows(given, batch, self.names)

    def folded(self) -> dict[str, Tensor]:
        """Return P*, u and v."""
        return {name: table.detach().float().clone() for name, table in self.named_parameters()}


class FoldedTask(TableEncoder):
    """A folded prompt of one task, [P, H]."""

    def __init__(self, name: str, tables: dict[str, Tensor]) -> None:
        super().__init__(tables)
        self.names = (name,)

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the prompt, [P, H]."""
        return super().forward(group, check_task(variant, self.names))

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int]:
        """Choose each row's task; `forward` refuses all tasks but 0."""
        return task_of_rows(given, batch, self.names)
