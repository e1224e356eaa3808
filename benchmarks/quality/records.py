"""Runs and their results: a JSON file for each run, so that an interrupted benchmark continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["development", "test"]


@dataclass(frozen=True)
class Run:
    """The settings of a run; the same settings give the same result.

    Attributes:
        task, model, contestant: names from `tasks`, `models` and `contestants`.
        shots: training rows of each class; 0 for contestants that see no rows.
        steps: optimizer steps.
        learning_rate: the peak learning rate.
        seed: of the training rows, the initial values and the order of the rows.
        part: the rows that are scored.
        options: options of the contestant that differ from its defaults, for the experiments on findings.
    """

    task: str
    model: str
    contestant: str
    shots: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    part: Part = "test"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def file(self) -> str:
        """The name of the result file."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}-{self.model}-{self.contestant}-{digest}.json"


@dataclass(frozen=True)
class Record:
    """The result of a run.

    Attributes:
        run: the settings.
        scores: a score for each row, in the order of the task's part: 1 or 0 for right or wrong, or ROUGE-L.
        trained: the number of trained parameters.
        saved_bytes: the size of what is saved.
        context_tokens: the tokens before each row, apart from virtual tokens.
        seconds: the wall time of training; for contexts, of scoring; for baselines without a model, of both.
        peak_bytes: the peak memory of the process.
        losses: the mean training loss of each tenth of the steps.
        versions: of Python and packages, and the provenance of the rows.
        extra: more results: `batch_size`, `scoring_seconds`, and `rows`, the number of rows in each part of the task.
    """

    run: Run
    scores: list[float]
    trained: int = 0
    saved_bytes: int = 0
    context_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores)


class Store:
    """A directory of results."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, run: Run) -> Record | None:
        """Return the result of a run, or None if it has not been run."""
        path = self.directory / run.file
        if not path.is_file():
            return None
        return _from_json(json.loads(path.read_text(encoding="utf-8")))

    def put(self, record: Record) -> None:
        """Write a result; an interruption leaves no incomplete file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / record.run.file
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
        part.replace(path)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs without a result, each once, in order."""
        return [run for run in dict.fromkeys(runs) if not (self.directory / run.file).is_file()]

    def check_provenance(self, task: str, provenance: dict[str, str]) -> None:
        """Raise a ValueError if a result of the task is from other rows, such as those of another release of Debian."""
        path = next(iter(sorted(self.directory.glob(f"{task}-*.json"))), None)
        if path is not None:
            before = json.loads(path.read_text(encoding="utf-8"))["versions"]
            changed = {
                name: (before.get(name), value) for name, value in provenance.items() if before.get(name) != value
            }
            if changed:
                raise ValueError(
                    f"{self.directory} has results of {task} from other rows; use another --output. "
                    f"Differences (before, now): {changed}"
                )

    def all(self) -> list[Record]:
        """Return all results, ordered by file name."""
        return [
            _from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(self.directory.glob("*.json"))
        ]


def _from_json(content: dict[str, Any]) -> Record:
    # JSON has lists only; the options of a run are tuples, so that it can be hashed.
    pairs = content["run"].pop("options")
    options = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in pairs)
    return Record(Run(**content.pop("run"), options=options), **content)
