"""Multitask prompt tuning: one shared prompt, and two vectors for each task that scale its rows and columns."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softhooks.encoder import EMBEDDINGS, PromptEncoder
from softhooks.errors import CheckpointError, OptionError, PromptMismatchError
from softhooks.method import Method, choice
from softhooks.methods.from_prompt import word_ids_of
from softhooks.methods.mpt_encoder import (
    TASK_IDS,
    FoldedTask,
    FoldedTasks,
    LearningEncoder,
    MultitaskEncoder,
    are_tasks,
    check_task,
)
from softhooks.methods.mpt_init import SEVERAL, front, ones, taught, vectors
from softhooks.methods.prompt_tuning import PromptTuning
from softhooks.methods.task_sampling import WEIGHTS, TaskSampler, column
from softhooks.objectives.distillation import Distillation

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    from softhooks.backbone.stack import ModelStructure
    from softhooks.objectives.base import Objective, PromptOnModel

NOISE = 0.02
"""Of u and v around 1 at the start."""

TRAIN = "train"


@dataclass(frozen=True)
class MultitaskPromptTuning(Method):
    """Multitask prompt tuning: `P_k = P* o (u_k v_k^T)`, with P* shared by K tasks and u_k, v_k for each of them.

    **Source training**: several tasks in one data set with a column `task_ids` (0 to K-1), which the model never sees. With
    `teachers`, vanilla prompts of the tasks on the same frozen model, the loss is `L + distillation * (KL(teacher || student) +
    MSE of the hidden states)`; the teacher's forward is at rest (no dropout), and a head that trains serves both.
    `teachers="train"` trains them in the same run: its first `teacher_steps` steps train the vanilla prompts on L, those after
    them the decomposition, under one optimizer and one schedule; so DDP must look for unused parameters, or is refused.
    Evaluation and saving take the decomposition throughout, which has not moved before; so compare checkpoints of later steps
    only.

    **Target adaptation**: `source=` a saved prompt. Each target starts from P* and the mean of the source's u and v. One target
    folds to one P x H matrix and needs no task id; several share P*.

    In an encoder-decoder the prompt goes to the encoder only. A Trainer's rows are drawn as in the paper; a loop of one's own
    uses `softhooks.TaskSampler`. In `rows`, a row's task id counts for the prompt of that row alone.

    Start from a learning rate of 1e-2 with AdamW; the paper's 0.3, with 10% of warm-up, is for T5 in full precision.

    Source: Wang et al. 2023, arXiv:2303.02861, and the authors' code. Differs: u and v start at 1 with a little noise and are
    decayed to 1; teachers can be trained in the run of their students; the hidden states compared are the last ones. Remembered,
    not read in the paper: lambda = 0.9 and the two learning rates 0.3 and 0.4.

    Args:
        num_virtual_tokens: P.
        tasks: their names, or how many. With one, `task_ids` may be left out.
        rank: r of u_k [P, r] and v_k [H, r]; the paper's is 1. Further columns start with v = 0, so that the product is ones.
        teachers: saved prompts (directories or hub ids) or tensors [P, H], in the order of the tasks or by name; or "train".
        teacher_steps: for how many steps of the optimizer the teachers train, with "train".
        distillation: lambda, the weight of what is learned from teachers.
        source: a saved prompt whose P*, u and v are taken up: of this method, or any prompt of [P, H]; also one of PEFT.
        task_rate: the learning rate of u and v in multiples of P*'s, with Adam and its kin, whatever the optimizer's groups. With
            SGD it counts twice (squared).
        sampling: how likely each task is drawn in a Trainer: `size`, `log`, `capped` or `equal` (see `TaskSampler`); None leaves
            the Trainer's own order.
        init, init_text, init_labels, init_tensor, tokenizer, whole_vocabulary: where P*, and teachers that are trained, start, as
            in `PromptTuning`.

    Shape:
        the encoder returns [P, H] for each task.

    Raises:
        OptionError: an option is wrong, or belongs to another.
    """

    kind: ClassVar[str] = "multitask_prompt_tuning"
    columns: ClassVar[tuple[str, ...]] = (TASK_IDS,)
    start_options: ClassVar[tuple[str, ...]] = (
        *PromptTuning.start_options,
        "source",
        "teachers",
        "teacher_steps",
        "sampling",
    )

    num_virtual_tokens: int
    tasks: int | Sequence[str] = field(kw_only=True)
    rank: int = field(default=1, kw_only=True)
    teachers: Any = field(default=None, kw_only=True, compare=False, repr=False)
    teacher_steps: int | None = field(default=None, kw_only=True)
    distillation: float = field(default=0.9, kw_only=True)
    source: str | Path | None = field(default=None, kw_only=True)
    task_rate: float = field(default=0.4 / 0.3, kw_only=True)
    sampling: str | None = field(default="size", kw_only=True)
    init: str = field(default="vocab", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_labels: Sequence[str] | None = field(default=None, kw_only=True)
    init_tensor: Tensor | None = field(default=None, kw_only=True, compare=False, repr=False)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    whole_vocabulary: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        super().__post_init__()
        if not isinstance(self.tasks, (int, str)):
            object.__setattr__(self, "tasks", tuple(self.tasks))  # as a file gives them back
        if not are_tasks(self.tasks):
            raise OptionError(f"tasks must be different names, or a number of 1 or more; it is {self.tasks!r}.")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise OptionError(f"rank must be a whole number of 1 or more; it is {self.rank!r}.")
        if not self.task_rate > 0 or not self.distillation >= 0:
            rates = f"task_rate {self.task_rate!r}, distillation {self.distillation!r}"
            raise OptionError(f"task_rate must be above 0 and distillation not below 0; they are {rates}.")
        if self.sampling is not None:
            choice("sampling", self.sampling, WEIGHTS)
        if self.source is not None and self.init != "vocab":
            raise OptionError(f"a prompt starts from source= or from init=, not both; init is {self.init!r}.")
        self._check_teachers()
        self._vanilla()

    def _check_teachers(self) -> None:
        given, steps = self.teachers, self.teacher_steps
        trains = isinstance(given, str) and given == TRAIN
        is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
        if trains != (steps is not None) or (trains and not is_count):
            raise OptionError(
                f"teacher_steps belongs to teachers='train', a whole number of 1 or more; it is {steps!r}, and teachers "
                f"{'is' if trains else 'is not'} 'train'."
            )
        if given is None or trains:
            return
        if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
            raise OptionError(f"teachers must be 'train', or one prompt for each task; it is {given!r}.")
        named = set(given) == set(self.names) if isinstance(given, Mapping) else len(given) == len(self.names)
        if not named:
            raise OptionError(
                "there must be one teacher for each task.",
                "Give a list in the order of the tasks, or a dictionary by name.",
                tasks=", ".join(self.names),
                teachers=list(given) if isinstance(given, Mapping) else len(given),
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names; their numbers, where they have none."""
        return tuple(map(str, range(self.tasks))) if isinstance(self.tasks, int) else tuple(self.tasks)

    def _vanilla(self) -> PromptTuning:
        """The prompt tuning by which P* starts, and a teacher."""
        return PromptTuning(
            self.num_virtual_tokens,
            init=self.init,
            init_text=self.init_text,
            init_labels=self.init_labels,
            init_tensor=self.init_tensor,
            tokenizer=self.tokenizer,
            whole_vocabulary=self.whole_vocabulary,
        )

    # --- the encoder --------------------------------------------------------------------------------------------------

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make P*, u and v, and what there is of teachers."""
        encoder = self._built(structure)
        if self.source is not None:
            encoder.start_ids = word_ids_of(self.source)
        return encoder

    def _built(self, structure: ModelStructure) -> PromptEncoder:
        start = self._start(structure) if self.source is None else self._adapt(structure, self.source)
        if self.teachers is None:
            return MultitaskEncoder(self.names, *start, self.task_rate)
        if self.teacher_steps is None:
            teachers = taught(self.names, self.teachers, self.num_virtual_tokens, structure)
            return MultitaskEncoder(self.names, *start, self.task_rate, teachers)
        vanilla = torch.stack([self._vanilla().rows(structure) for _ in self.names])
        return LearningEncoder(self.names, *start, self.task_rate, vanilla, self.teacher_steps)

    def _start(self, structure: ModelStructure) -> tuple[Tensor, Tensor, Tensor]:
        """P* from words, and u and v near ones."""
        shared = self._vanilla().rows(structure)
        left, right = ones(len(self.names), shared.shape, self.rank)
        left[..., 0] += NOISE * torch.randn_like(left[..., 0])
        right[..., 0] += NOISE * torch.randn_like(right[..., 0])
        return shared, left, right

    def _adapt(self, structure: ModelStructure, source: str | Path) -> tuple[Tensor, Tensor, Tensor]:
        """P* of a source prompt, and for each task the mean of its u and v."""
        stored, method = front("source", source, structure)
        tables, length = stored.tables, method.num_virtual_tokens
        rank = tables["left"].shape[1] if "left" in tables else self.rank
        if (length, rank) != (self.num_virtual_tokens, self.rank):
            raise PromptMismatchError(
                "a prompt must be as long as the source that it starts from, and of its rank.",
                "Set num_virtual_tokens and rank to those of the source.",
                source=f"{length} tokens, rank {rank} ({stored.source})",
                asked=f"{self.num_virtual_tokens} tokens, rank {self.rank}",
            )
        if EMBEDDINGS in tables:
            return tables[EMBEDDINGS], *ones(len(self.names), tables[EMBEDDINGS].shape, self.rank)
        means = [vectors.mean(0).expand(len(self.names), -1, -1) for vectors in vectors(tables)]
        return tables["shared"], means[0], means[1]

    # --- training -----------------------------------------------------------------------------------------------------

    def objective(self) -> Objective | None:
        """Learn from teachers, if there are any."""
        return None if self.teachers is None else Distillation(self.distillation, _speak)

    def has_idle(self, given: Container[str]) -> bool:
        """Say whether teachers are trained: then they, or the decomposition, have no part in a step."""
        return self.teacher_steps is not None

    @property
    def draws_rows(self) -> bool:
        """Whether rows are drawn as in the paper: where there are several tasks."""
        return self.sampling is not None and len(self.names) > 1

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Sampler[int]:
        """Draw rows as the paper does.

        Raises:
            TrainerError: the data set does not say the task of each row.
            UnsupportedModeError: it says one that there is not.
        """
        tasks = column(rows, TASK_IDS)
        for task in set(tasks):
            check_task(task, self.names)
        return TaskSampler(tasks, batch_size, weights=str(self.sampling), seed=seed)

    def probe_arguments(self) -> dict[str, Tensor]:
        """The first task, for the checks at attach."""
        return {TASK_IDS: torch.zeros(1, dtype=torch.long)}

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """One task: [P, H]. Several: P* [P, H], u [K * P, r], v [K * H, r]."""
        whole = super().shapes(structure)
        count, (length, width) = len(self.names), whole[EMBEDDINGS]
        if count == 1:
            return whole
        return dict(
            zip(SEVERAL, ((length, width), (count * length, self.rank), (count * width, self.rank)), strict=True)
        )

    def check_tables(self, tables: dict[str, Tensor], source: str) -> None:
        """Check what a file holds against the options that it names, before there is a model.

        Raises:
            CheckpointError: they contradict each other.
        """
        if len(self.names) == 1:
            super().check_tables(tables, source)
            return
        if set(tables) != set(SEVERAL) or tables["shared"].shape[0] != self.num_virtual_tokens:
            found = {name: list(table.shape) for name, table in tables.items()}
            raise CheckpointError(
                f"{source} must hold {', '.join(SEVERAL)} of {self.num_virtual_tokens} virtual tokens; it holds {found}."
            )

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a prompt that is folded."""
        return FoldedTask(self.names[0], tables) if len(self.names) == 1 else FoldedTasks(self.names, tables)

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder that goes on training a folded prompt, without teachers; one task's starts from ones again."""
        if EMBEDDINGS in tables:
            rows = tables[EMBEDDINGS]
            return MultitaskEncoder(self.names, rows, *ones(len(self.names), rows.shape, self.rank), self.task_rate)
        return MultitaskEncoder(self.names, tables["shared"], *vectors(tables), self.task_rate)


def _speak(prompt: PromptOnModel) -> AbstractContextManager[None] | None:
    """Let the teachers speak, once they are trained."""
    encoder = prompt.encoder
    if not isinstance(encoder, MultitaskEncoder) or encoder.teachers is None or encoder.is_learning_from_scratch:
        return None
    return encoder.teaching()
