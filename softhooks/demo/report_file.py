"""What the reports of both demos share: the versions, the file `report.json`, and the note on missing packages."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from rich.console import Console

from softhooks.demo.corpus import Corpus

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and transformers."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def as_text(options: DataclassInstance) -> dict[str, str]:
    """Return the options of a demo as strings, by name."""
    return {name: str(value) for name, value in asdict(options).items()}


def write_report(report: DataclassInstance, directory: Path) -> Path:
    """Write a report to `report.json` in a directory, and return the path."""
    path = directory / "report.json"
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return path


def print_missing(corpus: Corpus, console: Console) -> None:
    """Name the packages of the task that are not installed with this Python."""
    for package in corpus.missing:
        console.print(f"[yellow]{package} is not installed with this Python; the demo continues without it.[/]")
