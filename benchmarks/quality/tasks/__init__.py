"""The tasks. A task's rows are read when its function is called."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.task import Task
from benchmarks.quality.tasks.docstrings import docstrings
from benchmarks.quality.tasks.glosses import glosses
from benchmarks.quality.tasks.sections import sections
from benchmarks.quality.tasks.synopses import synopses

TASKS: dict[str, Callable[[], Task]] = {
    "docstrings": docstrings,
    "sections": sections,
    "synopses": synopses,
    "glosses": glosses,
}
