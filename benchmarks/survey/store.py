"""Results on disk: one file per model while the survey runs, and one file per task when all of its models are done."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.survey.case import Case
from benchmarks.survey.modality import Task

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers")
UNFINISHED = "not finished"


class Store:
    """What was found of each model by this version of the code.

    A result is kept under a digest of softhooks, of the survey and of the versions of torch and transformers. So an interrupted
    survey continues where it stopped, and a survey of changed code starts anew.

    Args:
        directory: where the digests' directories are.
    """

    def __init__(self, directory: Path = ROOT / "build" / "survey") -> None:
        self.parent = directory

    @cached_property
    def directory(self) -> Path:
        """The directory of this version of the code."""
        return self.parent / code_digest()

    def get(self, case: Case) -> dict[str, Any] | None:
        """What was found of a model; None if it was not examined, or its examination did not finish."""
        path = self._path(case)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return None if UNFINISHED in found else found

    def latest(self, case: Case) -> dict[str, Any] | None:
        """What was found of a model, also if its examination did not finish."""
        path = self._path(case)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, case: Case, found: dict[str, Any]) -> None:
        """Keep what was found of a model; kinds that were found before and are not in `found` stay."""
        before = self.get(case) or {}
        path = self._path(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(before | found), encoding="utf-8")
        temporary.replace(path)

    def _path(self, case: Case) -> Path:
        return self.directory / f"{case}.json"


def code_digest() -> str:
    """A digest of the code and the versions on which results depend."""
    digest = hashlib.sha256()
    files = [*(ROOT / "softhooks").rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    files += [ROOT / "tests" / "support" / "real_words.py"]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """The versions on which results depend."""
    return {"python": ".".join(map(str, sys.version_info[:2]))} | {name: version(name) for name in PACKAGES}


def write_task(task: Task, found: dict[str, dict[str, Any]], directory: Path) -> Path:
    """Write the results of a task, sorted, with a line for each kind of prompt, so that differences can be read."""
    lines = [f' "task": {json.dumps(task.name)},', f' "versions": {json.dumps(versions())},', ' "models": {']
    models = []
    for arch in sorted(found):
        rows = {name: value for name, value in found[arch].items() if name != "seconds"}
        inner = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in rows.items()
        )
        models.append(f"  {json.dumps(arch)}: {{\n{inner}\n  }}")
    lines += [",\n".join(models), " }"]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{task.name}.json"
    path.write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def read_tasks(tasks: Sequence[Task], directory: Path) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, str]]:
    """Read the results of tasks. -> the findings by task and architecture, and the versions with which they were found"""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    used: dict[str, dict[str, None]] = {}
    for task in tasks:
        path = directory / f"{task.name}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            found[task.name] = stored["models"]
            for name, value in stored["versions"].items():
                used.setdefault(name, {})[value] = None
    return found, {name: " and ".join(values) for name, values in used.items()}
