"""What is the synopsis of a Debian package, given its description? The answer is generated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.sources import Package, read_packages
from benchmarks.quality.task import Row, Task, Template
from benchmarks.quality.tasks.rows import distinct, first_words, make_parts, normalized
from benchmarks.quality.tasks.sections import one_per_source

# Sections of programs. The synopses of libraries and modules are mostly made from patterns, such as "module for ...".
SECTIONS = frozenset({
    "admin", "comm", "database", "editors", "education", "electronics", "games", "gnome", "graphics",
    "hamradio", "httpd", "kde", "mail", "math", "misc", "net", "news", "science",
    "shells", "sound", "tex", "text", "utils", "vcs", "video", "web", "x11",
    "xfce",
})  # fmt: skip
TEMPLATES = (
    Template("Description: ", "\nSummary:"),
    Template("", "\n\nIn short, this is", instructed=False),
)
WORDS = 64
MAX_LENGTH = 64
"""Tokens of a description. Most have more, so that most rows have the same length and are generated in full batches."""

SYNOPSIS_WORDS = range(3, 14)


def synopses(cache: Path | None = None) -> Task:
    """Read the task.

    Args:
        cache: the directory for fetched files, by default in the user's cache directory.
    """
    packages, provenance = read_packages(cache)
    return Task(
        "synopses",
        "Summarize the description of this software package in one short line.",
        TEMPLATES,
        (),
        *make_parts(synopsis_rows(packages), ()),
        max_length=MAX_LENGTH,
        max_new_tokens=24,
        provenance=provenance,
    )


def synopsis_rows(packages: Iterable[Package]) -> list[Row]:
    """Make a row of each source package, unless the description contains the synopsis, or another package has the same."""
    rows: dict[str, Row] = {}
    for package in one_per_source(package for package in packages if package.section in SECTIONS):
        text, synopsis = first_words(" ".join(package.paragraphs), WORDS), normalized(package.synopsis)
        if synopsis not in normalized(" ".join(package.paragraphs)) and len(synopsis.split()) in SYNOPSIS_WORDS:
            rows.setdefault(synopsis, Row(text, package.synopsis, package.source))
    return distinct(list(rows.values()))
