"""The report of a training run: a file, and a table for the terminal."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from transformers import TrainerState

from softhooks.base_model.info import BaseModelInfo
from softhooks.formats.files import write_json
from softhooks.prompt import SoftPrompt
from softhooks.recipe.encoded import Encoded
from softhooks.recipe.options import TrainOptions, learning_rate_of
from softhooks.recipe.table import Table

REPORT = "report.json"
_PACKAGES = ("softhooks", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class Report:
    """What a training run did.

    Attributes:
        rows: the number of training and of validation rows, and of rows that were truncated.
        columns: the format of the text and the column of the answers.
        base: the base model.
        parameters: the number of trained and of frozen parameters.
        before, after: the loss and the metric on the validation rows; empty without validation rows, and `before` also after
            `--resume`.
        majority: the share of validation rows with the most frequent answer.
        best_step: the step of the checkpoint that was kept; the last one without validation rows.
        bytes: the size of the saved prompt.
        frozen: the result of the check that the base model is unchanged.
        log: the entries that the Trainer logged.
    """

    output: str
    task: str
    method: str
    injection: str
    rows: dict[str, int]
    columns: dict[str, str | None]
    base: dict[str, Any]
    parameters: dict[str, int]
    metric: str
    before: dict[str, float]
    after: dict[str, float]
    majority: float | None
    steps: int
    best_step: int
    learning_rate: float
    seconds: float
    bytes: int
    frozen: dict[str, int]
    versions: dict[str, str]
    log: list[dict[str, float]]

    def write(self, directory: Path) -> None:
        """Write the report to a JSON file."""
        write_json(directory / REPORT, asdict(self))

    def show(self, console: Console) -> None:
        """Print the result."""
        table = RichTable.grid(padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._lines():
            table.add_row(name, Text(value))
        console.print(table)
        console.print(Text(f'Use it: model = softhooks.load_model("{self.output}")'), soft_wrap=True)

    def _lines(self) -> list[tuple[str, str]]:
        trained, frozen = self.parameters["trained"], self.parameters["frozen"]
        rows = f"{self.rows['train']:,} for training, {self.rows['validation']:,} for validation"
        if self.rows["truncated"]:
            rows += f"; {self.rows['truncated']:,} truncated (--max-length)"
        lines = [("rows", rows)]
        if self.after:
            name = self.metric
            start = "" if not self.before else f"{self.before[name]:.1%} before training, "
            most = "" if self.majority is None else f" (the most frequent answer alone: {self.majority:.1%})"
            lines.append((name.replace("_", " "), f"{start}{self.after[name]:.1%} after training{most}"))
            start = "" if not self.before else f"{self.before['loss']:.4g} before training, "
            lines.append(("loss", f"{start}{self.after['loss']:.4g} after training (on validation rows)"))
        lines += [
            ("steps", f"{self.steps:,} in {self.seconds:.0f} s; the prompt is that of step {self.best_step:,}"),
            ("trained", f"{trained:,} parameters, {trained / max(trained + frozen, 1):.3%} of all"),
            ("frozen", f"{self.frozen['tensors']:,} tensors, {self.frozen['bytes']:,} bytes, unchanged"),
            ("saved", f"{self.output}: {self.bytes:,} bytes, with {REPORT}"),
        ]
        return lines


def make_report(
    options: TrainOptions,
    table: Table,
    encoded: Encoded,
    prompt: SoftPrompt,
    state: TrainerState,
    seconds: float,
    before: dict[str, float],
    after: dict[str, float],
) -> Report:
    """Collect the report of a run; checks once more that the base model is unchanged."""
    checked = prompt.verify_frozen()
    trained = {id(parameter) for parameter in prompt.parameters()}
    frozen = sum(p.numel() for p in prompt.model.parameters() if id(p) not in trained)
    info = BaseModelInfo.of(prompt.model, prompt.prompted_model.structure)
    best = state.best_global_step if state.best_global_step and after else state.global_step
    return Report(
        output=str(options.output),
        task=options.task,
        method=repr(prompt.method),
        injection=prompt.injection,
        rows={
            "train": len(encoded.train),
            "validation": 0 if encoded.validation is None else len(encoded.validation),
            "truncated": encoded.truncated,
        },
        columns={"text": table.text, "label": table.label},
        base={"class": info.class_name, "name_or_path": info.name_or_path, "revision": info.revision},
        parameters={"trained": prompt.num_parameters, "frozen": frozen},
        metric=encoded.metric,
        before=before,
        after=after,
        majority=encoded.majority,
        steps=state.global_step,
        best_step=best,
        learning_rate=learning_rate_of(options, prompt.method),
        seconds=seconds,
        bytes=sum(file.stat().st_size for file in options.output.glob("soft_prompt*")),
        frozen={"tensors": checked.tensors, "bytes": checked.bytes},
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        log=[
            {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
            for entry in state.log_history
        ],
    )
