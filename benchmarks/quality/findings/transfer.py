"""Multitask prompt tuning: a prompt that was trained on source tasks learns a target task from few rows.

A run with the option `source_tasks` has two stages. First the runner trains a source prompt on `source_shots` training rows of
each class of these tasks, in batches that mix the tasks, for `source_steps` steps with the run's learning rate and seed:
- `multitask_prompt_tuning`: `MultitaskPromptTuning` with these `tasks`, and with `teachers` and `teacher_steps` if the run has
  them; each row has its task in `task_ids`. The second stage starts from it with `source=` and one task.
- `prompt_tuning`: one prompt for all rows. The second stage starts from it with `init="prompt"` and `init_from=`.
Source prompts start from words of the vocabulary, like the prompt from scratch. The second stage trains on the target task like
any other run. Each run trains a source prompt of its own, which is deleted when the run's process ends.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import FEW_SHOTS, LENGTH, SOURCE_TASKS
from benchmarks.quality.models import SMOLLM2

PAPER = "Wang et al. 2023 (MPT), arXiv:2303.02861"
SOURCE_SHOTS, SOURCE_STEPS, TEACHER_STEPS = 150, 200, 100


def _arm(label: str, contestant: str, **options: Any) -> Arm:
    return arm(label, contestant, SMOLLM2, shots=FEW_SHOTS, num_virtual_tokens=LENGTH, **options)


_SOURCES: dict[str, Any] = {
    "source_tasks": SOURCE_TASKS,
    "source_shots": SOURCE_SHOTS,
    "source_steps": SOURCE_STEPS,
}
_SCRATCH = _arm("prompt from scratch", "prompt_tuning", init="vocab")
_SHARED = _arm("one prompt of all source tasks", "prompt_tuning", init="prompt", **_SOURCES)
_ALONE = _arm("MPT without teachers", "multitask_prompt_tuning", **_SOURCES)
_TAUGHT = _arm(
    "MPT with teachers", "multitask_prompt_tuning", teachers="train", teacher_steps=TEACHER_STEPS, **_SOURCES
)
_ARMS = (_SCRATCH, _SHARED, _ALONE, _TAUGHT)

FINDINGS = (
    Finding(
        "transfer",
        PAPER,
        "With few rows of the target task, a multitask prompt of source tasks is better than a prompt from scratch.",
        _ARMS,
        all_hold(Expect(_TAUGHT, _SCRATCH)),
        bars(_ARMS, "MPT: transfer"),
    ),
    Finding(
        "transfer_parts",
        PAPER,
        "The decomposition and the teachers both help: removing either one makes the transferred prompt worse.",
        (_SHARED, _ALONE, _TAUGHT),
        all_hold(Expect(_ALONE, _SHARED), Expect(_TAUGHT, _ALONE)),
        bars((_SHARED, _ALONE, _TAUGHT), "MPT: decomposition and teachers"),
    ),
)
