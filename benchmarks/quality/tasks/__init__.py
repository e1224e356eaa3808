"""The tasks. A task's rows are read when its function is called."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.quality.task import Task, Template
from benchmarks.quality.tasks.docstrings import TEMPLATES as DOCSTRING_TEMPLATES
from benchmarks.quality.tasks.docstrings import docstrings
from benchmarks.quality.tasks.glosses import TEMPLATES as GLOSS_TEMPLATES
from benchmarks.quality.tasks.glosses import glosses
from benchmarks.quality.tasks.manual import manual
from benchmarks.quality.tasks.sections import TEMPLATES as SECTION_TEMPLATES
from benchmarks.quality.tasks.sections import sections
from benchmarks.quality.tasks.synopses import TEMPLATES as SYNOPSIS_TEMPLATES
from benchmarks.quality.tasks.synopses import synopses

TASKS: dict[str, Callable[[], Task]] = {
    "docstrings": docstrings,
    "sections": sections,
    "synopses": synopses,
    "glosses": glosses,
    "manual": manual,
}
TEMPLATES: dict[str, tuple[Template, ...]] = {
    "docstrings": DOCSTRING_TEMPLATES,
    "sections": SECTION_TEMPLATES,
    "synopses": SYNOPSIS_TEMPLATES,
    "glosses": GLOSS_TEMPLATES,
}
"""The templates of each task."""
