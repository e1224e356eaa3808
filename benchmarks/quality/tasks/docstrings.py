"""Which package of Python's standard library does a docstring come from? The rows come from the demo's corpus."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.task import Row, Task, Template
from benchmarks.quality.tasks.rows import choose
from softhooks.demo import corpus

TEMPLATES = (
    Template("# ", "\nimport", instructed=False),
    Template('"""', '"""\nfrom', instructed=False),
    Template("Documentation: ", "\nPackage:"),
)
TEST_FRACTION, DEVELOPMENT_FRACTION = 1 / 3, 1 / 5


def docstrings(stdlib: Path | None = None) -> Task:
    """Read the task.

    For SmolLM2, each package's name after a space is one token, except ` importlib`, which begins with ` import`.
    `logging` has three files, so that it may have no development rows.

    Args:
        stdlib: a standard library, by default that of the running Python.
    """
    read = corpus.read_corpus(stdlib)
    rest, test = corpus.split(read.rows, TEST_FRACTION, seed=0)
    train, development = corpus.split(rest, DEVELOPMENT_FRACTION, seed=0)
    parts = choose(_rows(train), _rows(development), _rows(test), read.labels)
    return Task(
        "docstrings",
        f"Name the Python package ({', '.join(read.labels)}) that this documentation belongs to.",
        TEMPLATES,
        read.labels,
        *parts,
        max_length=48,
        provenance={"standard library": f"Python {platform.python_version()}"},
    )


def _rows(rows: Sequence[corpus.Row]) -> list[Row]:
    return [Row(row.text, row.package, row.source) for row in rows]
