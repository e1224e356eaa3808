"""The modalities. To add one, write its file and add it to the list."""

from __future__ import annotations

from benchmarks.survey.modalities.features import FEATURES
from benchmarks.survey.modalities.text import TEXT
from benchmarks.survey.modality import Modality, Task

MODALITIES: tuple[Modality, ...] = (TEXT, FEATURES)

MODALITY_OF: dict[str, Modality] = {task.name: modality for modality in MODALITIES for task in modality.tasks}
"""Modalities by the name of a task."""

TASKS: dict[str, Task] = {task.name: task for modality in MODALITIES for task in modality.tasks}
"""Tasks by name, in the order of the report."""
