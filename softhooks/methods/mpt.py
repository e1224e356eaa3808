"""Multitask prompt tuning: one prompt that several tasks share, multiplied by a low-rank matrix for each task."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import (
    MAX_WIDTH,
    CheckpointError,
    OptionError,
    PromptMismatchError,
    check_choice,
    check_int,
    is_int,
)
from softhooks.method import Method
from softhooks.methods.from_prompt import word_ids_of
from softhooks.methods.mpt_encoder import (
    MAX_TASKS,
    TASK_IDS,
    FoldedTask,
    FoldedTasks,
    MultitaskEncoder,
    TeacherTrainingEncoder,
    are_tasks,
    check_task,
)
from softhooks.methods.mpt_init import SEVERAL, ones, read_front_prompt, read_teachers, vectors
from softhooks.methods.prompt_tuning import Init, PromptTuning
from softhooks.methods.task_sampling import TaskSampler, Weights, task_column
from softhooks.objectives.base import Objective, PromptOnModel
from softhooks.objectives.distillation import Distillation
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder

NOISE = 0.02
"""The standard deviation of the initial u and v around 1."""

TRAIN = "train"
"""The value of `teachers` that trains them in the same run."""


@dataclass(frozen=True)
class MultitaskPromptTuning(Method):
    """Multitask prompt tuning: `P_k = P* o (u_k v_k^T)`, [P, H], where K tasks share P* and each has its own u_k and v_k.

    `o` is the elementwise product.

    **Source training**: the dataset has rows of all tasks, and its column `task_ids` has each row's task, 0 to K-1. With
    `teachers`, one prompt per task for the same model, the loss is `L + distillation * (KL(teacher || student) + MSE of the
    hidden states)`, where L is the model's own loss and the teacher runs in evaluation mode. With `teachers="train"`, the first
    `teacher_steps` steps train the teachers on L, and all later steps train P*, u and v; DDP requires
    `find_unused_parameters=True`. Evaluation and saving always use P*, u and v, so do not choose a checkpoint from the first
    `teacher_steps` steps.

    **Target adaptation**: with `source=`, a saved prompt, each task starts from the saved P* and the mean of the saved u and v. A
    prompt for one task is saved as a single matrix [P, H], and needs no `task_ids`.

    In an encoder-decoder, the prompt is added only to the encoder's input. A Trainer draws rows as in the paper; in your own
    training loop, use `softhooks.TaskSampler`. With `softhooks.rows`, a row's task id refers to the tasks of the prompt that
    this row uses.

    Start with AdamW and a learning rate of 1e-2; the paper's 0.3, with 10% warm-up, is for T5 in full precision.

    Source: Wang et al. 2023, arXiv:2303.02861, and the authors' code. Differences: u and v start at 1 with a little noise, and
    weight decay pulls them toward 1; teachers can be trained in the same run; only the last hidden states are compared. The
    defaults of `distillation` and `task_rate` (0.4 / 0.3) have not been checked against the paper.

    Args:
        num_virtual_tokens: P.
        tasks: the names of the tasks, or their number. With one task, `task_ids` may be left out.
        rank: r of u_k [P, r] and v_k [H, r]; 1 in the paper.
        teachers: saved prompts (directories or Hub ids) or tensors [P, H], as a list in the order of the tasks or as a dictionary
            with the names of the tasks as keys; or "train".
        teacher_steps: the number of optimizer steps that train the teachers; required with teachers="train".
        distillation: the weight of the distillation loss.
        source: a saved prompt to start from: one of this method, or any prompt of shape [P, H], including PEFT's.
        task_rate: the learning rate of u and v divided by that of P*, with Adam and similar optimizers. With SGD the ratio is
            `task_rate` squared.
        sampling: the probability of each task in a Trainer: `size`, `log`, `capped` or `equal` (see `TaskSampler`); None uses the
            Trainer's own sampler.
        init, init_text, init_labels, init_tensor, tokenizer, whole_vocabulary: the initialization of P*, and of teachers that are
            trained; see `PromptTuning`.

    Raises:
        OptionError: an option is wrong, or requires another option.
    """

    kind: ClassVar[str] = "multitask_prompt_tuning"
    columns: ClassVar[tuple[str, ...]] = (TASK_IDS,)
    sampler_class: ClassVar[type[TaskSampler]] = TaskSampler
    init_options: ClassVar[tuple[str, ...]] = (
        *PromptTuning.init_options,
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
    sampling: Weights | None = field(default="size", kw_only=True)
    init: Init = field(default="vocab", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_labels: Sequence[str] | None = field(default=None, kw_only=True)
    init_tensor: Tensor | None = field(default=None, kw_only=True, compare=False, repr=False)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    whole_vocabulary: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tasks, (int, str)):
            object.__setattr__(self, "tasks", tuple(self.tasks))  # a saved prompt has a list
        if not are_tasks(self.tasks):
            raise OptionError(
                f"tasks is {self.tasks!r}; it must be a list of unique names or an integer from 1 to {MAX_TASKS:,}."
            )
        check_int("rank", self.rank, maximum=MAX_WIDTH)
        if not self.task_rate > 0 or not self.distillation >= 0:
            raise OptionError(
                f"task_rate is {self.task_rate!r} and distillation is {self.distillation!r}; task_rate must be above 0, and "
                "distillation must be 0 or more."
            )
        if self.sampling is not None:
            check_choice("sampling", self.sampling, get_args(Weights))
        if self.source is not None and self.init != "vocab":
            raise OptionError(f"source= and init={self.init!r} are both given; pass one of them.")
        self._check_teachers()
        self._vanilla()  # checks `init` and its options

    def _check_teachers(self) -> None:
        given, steps = self.teachers, self.teacher_steps
        trains = isinstance(given, str) and given == TRAIN
        if trains and not is_int(steps, 1):
            raise OptionError(f"teacher_steps is {steps!r}; teachers='train' requires an integer of at least 1.")
        if not trains and steps is not None:
            raise OptionError(
                f"teacher_steps is {steps!r}, but teachers is not 'train'; only teachers='train' accepts it."
            )
        if given is None or trains:
            return
        if isinstance(given, str) or not isinstance(given, (Mapping, Sequence)):
            raise OptionError(
                f"teachers is {given!r}; it must be 'train', or a list or dictionary with one prompt for each task."
            )
        named = set(given) == set(self.names) if isinstance(given, Mapping) else len(given) == len(self.names)
        if not named:
            raise OptionError(
                f"the {len(given)} teachers do not match the {len(self.names)} tasks; give one teacher for each task.",
                "Pass a list in the order of the tasks, or a dictionary with their names as keys.",
                tasks=", ".join(self.names),
                teachers=list(given) if isinstance(given, Mapping) else len(given),
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks, or their numbers if they have no names."""
        return tuple(map(str, range(self.tasks))) if isinstance(self.tasks, int) else tuple(self.tasks)

    def _vanilla(self) -> PromptTuning:
        """Return the method that initializes P* and the teachers."""
        shared = {item.name for item in fields(self)} & {item.name for item in fields(PromptTuning)}
        return PromptTuning(**{name: getattr(self, name) for name in shared})

    # --- the encoder --------------------------------------------------------------------------------------------------

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with P*, u and v, and with the teachers if there are any."""
        start = self._start(structure) if self.source is None else self._adapt(structure, self.source)
        encoder: MultitaskEncoder
        if self.teacher_steps is not None:
            vanilla = torch.stack([self._vanilla().initial_rows(structure)[0] for _ in self.names])
            encoder = TeacherTrainingEncoder(self.names, *start, self.task_rate, vanilla, self.teacher_steps)
        elif self.teachers is not None:
            teachers = read_teachers(self.names, self.teachers, self.num_virtual_tokens, structure)
            encoder = MultitaskEncoder(self.names, *start, self.task_rate, teachers)
        else:
            encoder = MultitaskEncoder(self.names, *start, self.task_rate)
        if self.source is not None:
            encoder.start_ids = word_ids_of(self.source)
        return encoder

    def _start(self, structure: ModelStructure) -> tuple[Tensor, Tensor, Tensor]:
        """Initialize P* as `init` says, and u and v so that every number in u v^T is close to 1."""
        shared = self._vanilla().initial_rows(structure)[0]
        left, right = ones(len(self.names), shared.shape, self.rank)
        left[..., 0] += NOISE * torch.randn_like(left[..., 0])
        right[..., 0] += NOISE * torch.randn_like(right[..., 0])
        return shared, left, right

    def _adapt(self, structure: ModelStructure, source: str | Path) -> tuple[Tensor, Tensor, Tensor]:
        """Return P* of a source prompt, and for each task the mean of the source's u and v."""
        stored, method = read_front_prompt("source", source, structure)
        tables, length = stored.tables, method.num_virtual_tokens
        rank = tables["left"].shape[1] if "left" in tables else self.rank
        if (length, rank) != (self.num_virtual_tokens, self.rank):
            raise PromptMismatchError(
                f"the source has {length} virtual tokens and rank {rank}; both must equal those of the new prompt.",
                "Set num_virtual_tokens and rank to those of the source.",
                source=f"{length} tokens, rank {rank} ({stored.source})",
                asked=f"{self.num_virtual_tokens} tokens, rank {self.rank}",
            )
        if EMBEDDINGS in tables:
            return tables[EMBEDDINGS], *ones(len(self.names), tables[EMBEDDINGS].shape, self.rank)
        means = [each.mean(0).expand(len(self.names), -1, -1) for each in vectors(tables)]
        return tables["shared"], means[0], means[1]

    # --- training -----------------------------------------------------------------------------------------------------

    def objective(self) -> Objective | None:
        """Return the distillation objective, or None if there are no teachers."""
        return None if self.teachers is None else Distillation(self.distillation, _teaching)

    def has_unused_parameters(self, given: Container[str]) -> bool:
        """Return whether teachers are trained: each step then trains either the teachers, or P*, u and v."""
        return self.teacher_steps is not None

    @property
    def has_sampler(self) -> bool:
        """Whether a Trainer draws rows with `TaskSampler`."""
        return self.sampling is not None and len(self.names) > 1

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Sampler[int]:
        """Make a `TaskSampler`."""
        tasks = task_column(rows, TASK_IDS)
        for task in set(tasks):
            check_task(task, self.names)
        assert self.sampling is not None  # see `has_sampler`
        return TaskSampler(tasks, batch_size, weights=self.sampling, seed=seed)

    def probe_arguments(self) -> dict[str, Tensor]:
        """Return `task_ids` for one row of the first task."""
        return {TASK_IDS: torch.zeros(1, dtype=torch.long)}

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """Return [P, H] for one task, or the shapes of P* [P, H], u [K * P, r] and v [K * H, r]."""
        whole = super().shapes(structure)
        count, (length, width) = len(self.names), whole[EMBEDDINGS]
        if count == 1:
            return whole
        return dict(
            zip(SEVERAL, ((length, width), (count * length, self.rank), (count * width, self.rank)), strict=True)
        )

    def check_tables(self, tables: dict[str, Tensor], source: str) -> None:
        """Check the tensors of a saved prompt against its options, before a model is known."""
        if len(self.names) == 1:
            super().check_tables(tables, source)
            return
        if set(tables) != set(SEVERAL) or tables["shared"].shape[0] != self.num_virtual_tokens:
            found = {name: list(table.shape) for name, table in tables.items()}
            raise CheckpointError(
                f"{source} has the tensors {found}; it must have {', '.join(SEVERAL)}, for {self.num_virtual_tokens} virtual "
                "tokens."
            )

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a folded prompt."""
        return FoldedTask(self.names[0], tables) if len(self.names) == 1 else FoldedTasks(self.names, tables)

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make an encoder to continue training, without teachers. For a single task, u v^T is reset to a matrix of ones."""
        if EMBEDDINGS in tables:
            rows = tables[EMBEDDINGS]
            return MultitaskEncoder(self.names, rows, *ones(len(self.names), rows.shape, self.rank), self.task_rate)
        return MultitaskEncoder(self.names, tables["shared"], *vectors(tables), self.task_rate)


def _teaching(prompt: PromptOnModel) -> AbstractContextManager[None] | None:
    """Return a context manager for running the model with the teachers; None without teachers, or if this step trains them."""
    encoder = prompt.encoder
    if not isinstance(encoder, MultitaskEncoder) or encoder.teachers is None or encoder.trains_teachers:
        return None
    return encoder.teaching()
