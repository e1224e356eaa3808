"""The report of the demo: a table of results, the check of the frozen weights, and the code for loading the prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Line:
    """A line of the table: a training run or a baseline. Values that do not apply are None.

    Attributes:
        name: the name of the training run or baseline.
        accuracy: the accuracy on the test rows.
        trained: the number of trained parameters.
        seconds: the training time; for logistic regression, the time to compute the features is included.
        checkpoint_bytes: the size of the saved checkpoint.
        frozen_tensors: the number of frozen tensors, all of which were compared with their values before training.
        frozen_bytes: the size of these tensors.
    """

    name: str
    accuracy: float
    trained: int
    seconds: float | None = None
    checkpoint_bytes: int | None = None
    frozen_tensors: int | None = None
    frozen_bytes: int | None = None


@dataclass(frozen=True)
class Reloaded:
    """A comparison between a trained prompt and its saved copy, loaded onto a fresh model.

    Attributes:
        name: the name of the training run.
        directory: the directory of the saved prompt.
        same: the number of test rows with the same prediction.
        rows: the number of test rows.
        largest_difference: the largest absolute difference between logits.
    """

    name: str
    directory: str
    same: int
    rows: int
    largest_difference: float


@dataclass(frozen=True)
class Report:
    """All results of the demo; `report.json` contains the same values."""

    model: str
    train_rows: int
    test_rows: int
    lines: list[Line]
    reloaded: list[Reloaded]
    versions: dict[str, str]
    options: dict[str, str]

    @property
    def standard_error(self) -> float:
        """The standard error of the best accuracy, computed from the number of test rows."""
        best = max(line.accuracy for line in self.lines)
        return math.sqrt(best * (1 - best) / self.test_rows)


def print_report(report: Report, output: Path, console: Console) -> None:
    """Print the report."""
    console.print()
    console.print(_table(report))
    console.print(
        f"* on the mean-pooled features of the frozen model. Standard error: {100 * report.standard_error:.1f} points.\n"
    )
    for line in report.lines:
        if line.frozen_tensors is not None:
            console.print(f"{line.name}: frozen: {line.frozen_tensors} tensors, {line.frozen_bytes:,} bytes, unchanged")
    console.print()
    for reloaded in report.reloaded:
        console.print(
            f"{reloaded.name}: loaded into a fresh model, {reloaded.same} of {reloaded.rows} predictions are the same; "
            f"the largest difference between logits is {reloaded.largest_difference:g}",
            soft_wrap=True,
        )
    console.print(f"\nCheckpoints and report.json are in {output}. To load a prompt:", markup=False, soft_wrap=True)
    for reloaded in report.reloaded:
        console.print(f'  softhooks.load(model, "{reloaded.directory}")', markup=False, highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    best = max(line.accuracy for line in report.lines)
    table = Table(title=f"{report.model}, {report.train_rows} training and {report.test_rows} test rows")
    table.add_column("")
    for header in ("accuracy", "trained", "seconds", "saved bytes"):
        table.add_column(header, justify="right")
    for line in report.lines:
        accuracy = f"{line.accuracy:.3f}"
        table.add_row(
            line.name,
            f"[bold]{accuracy}[/]" if line.accuracy == best else accuracy,
            f"{line.trained:,}",
            "" if line.seconds is None else f"{line.seconds:.0f}",
            "" if line.checkpoint_bytes is None else f"{line.checkpoint_bytes:,}",
        )
    return table
