"""In which section of Debian's archive is a package? The text is the synopsis and the beginning of the description."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.sources import Package, read_packages
from benchmarks.quality.task import Row, Task, Template
from benchmarks.quality.tasks.rows import MASK, class_names, distinct, first_words, make_parts, whole_names

# After a space, each name is one token for SmolLM2.
LABELS = {
    "games": "games",
    "graphics": "graphics",
    "mail": "mail",
    "math": "math",
    "net": "network",
    "science": "science",
    "sound": "sound",
    "web": "web",
}
"""The names of the classes by section."""

TEMPLATES = (
    Template("Description: ", "\nSection:"),
    Template("", "\n\nThis is a package for", instructed=False),
    Template("Package: ", "\nSection:"),
)
WORDS = 32
_NAMES = class_names(
    LABELS.values(), r"gam(?:e|er|ing)", r"graphic(?:al|ally)?", r"scientific\w*", r"scientists?", "net"
)


def sections(cache: Path | None = None) -> Task:
    """Read the task.

    Args:
        cache: the directory for fetched files, by default in the user's cache directory.
    """
    packages, provenance = read_packages(cache)
    labels = tuple(LABELS.values())
    return Task(
        "sections",
        f"Name the section ({', '.join(labels)}) of the software archive that this package belongs to.",
        TEMPLATES,
        labels,
        *make_parts(section_rows(packages), labels),
        max_length=64,
        provenance=provenance,
    )


def section_rows(packages: Iterable[Package]) -> list[Row]:
    """Make a row of each package in these sections, with masked names; the first of each source package."""
    rows: dict[str, Row] = {}
    for package in one_per_source(package for package in packages if package.section in LABELS):
        text = whole_names(package.name, package.source).sub(MASK, f"{package.synopsis}. {package.paragraphs[0]}")
        text = first_words(_NAMES.sub(MASK, text), WORDS)
        rows[package.source] = Row(text, LABELS[package.section], package.source)
    return distinct(list(rows.values()))


def one_per_source(packages: Iterable[Package]) -> list[Package]:
    """Keep the package with the shortest name of each source, because packages of the same source have similar descriptions."""
    kept: dict[str, Package] = {}
    for package in sorted(packages, key=lambda package: (len(package.name), package.name)):
        kept.setdefault(package.source, package)
    return sorted(kept.values(), key=lambda package: package.source)
