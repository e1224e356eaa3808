"""Tiny models of any architecture, as the survey makes them."""

from __future__ import annotations

from typing import Any

from benchmarks.survey.case import Case
from benchmarks.survey.modalities import TASKS
from benchmarks.survey.tiny import tiny_model


def build(arch: str, task: str, **changes: Any) -> Any:
    """Make a tiny model.

    Args:
        arch: the `model_type` of its config.
        task: the name of a task of the survey, such as `causal`.
        changes: attributes of the config to set.
    """
    return tiny_model(Case(task, arch, tuple(changes.items())), TASKS[task])
