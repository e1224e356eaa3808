"""The corpus: one folder for each reader.

A folder contains seeds (`seed-...`), inputs that once failed (`found-...`), and inputs that reach further code.
"""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def readers() -> list[str]:
    """The names of the readers."""
    return sorted(folder.name for folder in CORPUS.iterdir() if folder.is_dir())


def inputs() -> list[tuple[str, Path]]:
    """Each input of the corpus with the name of its reader."""
    return [(name, file) for name in readers() for file in sorted((CORPUS / name).iterdir())]
