"""The demo's texts: the first paragraphs of docstrings in Python's standard library, each labeled with its package.

The source files are parsed, never imported. A package that is not installed (tkinter is often separate) is left out. Package
names are masked, so that no text contains its label. No text occurs twice. The rows of a source file are all training rows or all
test rows.
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
    """A text, its package, and its source file, as a path relative to the library."""

    text: str
    package: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """All rows, in a fixed order, and the packages that are not installed."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the installed packages; the class of a row is the index of its package in this list."""
        return tuple(package for package in PACKAGES if package not in self.missing)


def read_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the docstrings of a standard library, by default that of the running Python."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    rows = _unambiguous([row for package in PACKAGES for row in _package_rows(root, package)])
    present = {row.package for row in rows}
    if len(present) < 2:
        raise SoftHooksError(
            f"the standard library has .py files for {len(present)} of the demo's packages; at least two packages are needed.",
            "Run the demo with a Python whose standard library is installed as .py files.",
            looked_in=root,
            found=", ".join(sorted(present)) or "none",
        )
    return Corpus(rows, tuple(package for package in PACKAGES if package not in present))


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split the rows into training and test rows, so that all rows of a source file are in the same split.

    Args:
        fraction: the largest share of each package's rows that may become test rows.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        sizes[row.package][row.source] += 1
    held_out: set[str] = set()
    for package in sorted(sizes):
        held_out |= _choose_files(sizes[package], fraction, random.Random(f"{seed} {package}"))
    return [row for row in rows if row.source not in held_out], [row for row in rows if row.source in held_out]


def _choose_files(sizes: Counter[str], fraction: float, generator: random.Random) -> set[str]:
    """Draw random files with at most `fraction` of a package's rows; of several draws, return the one with the most rows."""
    best: set[str] = set()
    for _ in range(SPLIT_DRAWS):
        files = sorted(sizes)
        generator.shuffle(files)
        chosen: set[str] = set()
        remaining = fraction * sizes.total()
        for file in files:
            if sizes[file] <= remaining:
                chosen.add(file)
                remaining -= sizes[file]
        best = max(best, chosen, key=lambda chosen: sum(sizes[file] for file in chosen))
    return best


def _package_rows(root: Path, package: str) -> Iterator[Row]:
    """Yield the rows of a package, without its tests, which some distributions of Python include."""
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
    """Return the first paragraph on a single line, with package names masked."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return _NAMES.sub(MASK, " ".join(paragraph.split()))


def _unambiguous(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Remove duplicates, and remove texts that occur in more than one package, because no classifier could tell their class."""
    packages: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        packages[row.text.casefold()].add(row.package)
    kept: dict[str, Row] = {}
    for row in rows:
        if len(packages[row.text.casefold()]) == 1:
            kept.setdefault(row.text.casefold(), row)
    return tuple(kept.values())
