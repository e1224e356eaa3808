"""The demo's text: first paragraphs of the Python standard library's own docstrings, classified by their package.

Every machine that runs Python has it, so nothing is downloaded. Files are parsed and never imported; a package that
this machine lacks (tkinter is often packaged apart) is reported and left out. What would give the answer away is
removed: the ten names are masked in every text, no text stands in two rows, and no source file is on both sides of a
split.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softhooks.errors import SoftHooksError

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "xml",
)
MASK = "_"
MIN_WORDS = 4
SPLIT_DRAWS = 8
_NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Row:
    """One text, the package that it comes from, and the source file (relative to the library) that it stands in."""

    text: str
    package: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Every row, in a fixed order, and the packages that this machine lacks."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The packages that are present: a row's class is its package's index here."""
        return tuple(package for package in PACKAGES if package not in self.missing)


def read_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the docstrings of this machine's standard library.

    Args:
        stdlib: the library's directory; by default the one of the running Python.

    Raises:
        SoftHooksError: fewer than two of the packages are there, so that nothing could be classified.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    rows = _unambiguous([row for package in PACKAGES for row in _package_rows(root, package)])
    present = {row.package for row in rows}
    if len(present) < 2:
        raise SoftHooksError(
            "the demo needs the source files of at least two packages of the standard library.",
            "Run it with a Python that ships its library as .py files.",
            looked_in=root,
            found=", ".join(sorted(present)) or "none",
        )
    return Corpus(rows, tuple(package for package in PACKAGES if package not in present))


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide the rows by whole source files, package by package.

    Args:
        rows: what to divide.
        fraction: the second part's share of each package's rows, at most; a file that would exceed it stays in the
            first part.
        seed: the same seed divides the same rows in the same way.

    Returns:
        The two parts, both in the order of `rows`.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        sizes[row.package][row.source] += 1
    held_out: set[str] = set()
    for package in sorted(sizes):
        held_out |= _choose_files(sizes[package], fraction, random.Random(f"{seed} {package}"))
    return [row for row in rows if row.source not in held_out], [row for row in rows if row.source in held_out]


def _choose_files(sizes: Counter[str], fraction: float, generator: random.Random) -> set[str]:
    """Files that together hold the given fraction of a package's rows, or a little less: the best of several draws."""
    best: set[str] = set()
    for _ in range(SPLIT_DRAWS):
        files = sorted(sizes)
        generator.shuffle(files)
        chosen: set[str] = set()
        room = fraction * sizes.total()
        for file in files:
            if sizes[file] <= room:
                chosen.add(file)
                room -= sizes[file]
        best = max(best, chosen, key=lambda chosen: sum(sizes[file] for file in chosen))
    return best


def _package_rows(root: Path, package: str) -> Iterator[Row]:
    """The rows of one package, tests left out (some Pythons ship unittest's own)."""
    for file in sorted((root / package).rglob("*.py")):
        source = file.relative_to(root)
        if {"test", "tests"} & set(source.parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, _DOCUMENTED):
                text = _first_paragraph(ast.get_docstring(node) or "")
                if len(text.split()) >= MIN_WORDS:
                    yield Row(text, package, source.as_posix())


def _first_paragraph(docstring: str) -> str:
    """The docstring up to its first blank line, on one line, with every package's name masked."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _NAMES.sub(MASK, " ".join(paragraph.split()))


def _unambiguous(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Each text once, and none that two packages share: no classifier could be right about both."""
    packages: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        packages[row.text.casefold()].add(row.package)
    kept: dict[str, Row] = {}
    for row in rows:
        if len(packages[row.text.casefold()]) == 1:
            kept.setdefault(row.text.casefold(), row)
    return tuple(kept.values())
