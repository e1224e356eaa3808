"""The report of the demo: a table, the check of the frozen weights, and generated answers with and without a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softhooks.demo.language_model.task import Format

EXPLANATION = """\
accuracy: on the test rows, with its standard error; the most likely of the packages' names counts as the answer
question: the instruction as plain text, without a chat template; code: a docstring followed by an import
few-shot: one example of each package in the context
context: tokens of instruction and examples before each text; trained: numbers
seconds: to train, with the evaluations during training; for the untrained model, to answer
"""


@dataclass(frozen=True)
class Line:
    """A line of the table. Values that do not apply are None.

    Attributes:
        name: the name of the baseline or training run.
        accuracy, standard_error: on the test rows.
        seconds: the time for training, or for the predictions of a baseline.
        context_tokens: the number of tokens of instruction and examples before each row; virtual tokens are not counted.
        trained: the number of trained parameters.
        saved_bytes: the size of the saved prompt.
        frozen_tensors, frozen_bytes: the number and size of the frozen tensors, all of which are as before training, bit for
            bit.
    """

    name: str
    accuracy: float
    standard_error: float
    seconds: float = 0.0
    context_tokens: int = 0
    trained: int = 0
    saved_bytes: int | None = None
    frozen_tensors: int | None = None
    frozen_bytes: int | None = None


@dataclass(frozen=True)
class Example:
    """The answers generated for a docstring: zero-shot, and with the soft prompt."""

    text: str
    package: str
    before: str
    after: str


@dataclass(frozen=True)
class Reloaded:
    """The comparison of a saved prompt, loaded onto a fresh model, with the trained prompt.

    Attributes:
        name, directory: of the training run.
        same, rows: the number of test rows with the same prediction, and the number compared.
        same_texts, texts: the number of generated answers that are equal, and the number compared.
        largest_difference: the largest absolute difference between logits.
    """

    name: str
    directory: str
    same: int
    rows: int
    same_texts: int
    texts: int
    largest_difference: float


@dataclass(frozen=True)
class Report:
    """All results of the demo; `report.json` contains the same values."""

    model: str
    train_rows: int
    test_rows: int
    lines: list[Line]
    examples: list[Example]
    reloaded: list[Reloaded]
    model_path: str
    format: Format
    curves: str
    versions: dict[str, str]
    options: dict[str, str]


def print_report(report: Report, output: Path, console: Console) -> None:
    """Print the report."""
    console.print()
    console.print(_table(report))
    console.print(EXPLANATION, highlight=False, soft_wrap=True)
    for line in report.lines:
        if line.frozen_tensors is not None:
            console.print(f"{line.name}: frozen: {line.frozen_tensors} tensors, {line.frozen_bytes:,} bytes, unchanged")
    console.print("\n[bold]What the model generates[/]")
    for example in report.examples:
        console.print(f"  {example.text!r}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"    zero-shot: {example.before!r}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"    [bold]with the soft prompt: {escape(repr(example.after))}[/] (right: {example.package})",
            highlight=False,
            soft_wrap=True,
        )
    console.print()
    for reloaded in report.reloaded:
        console.print(
            f"{reloaded.name}, loaded onto a fresh model: {reloaded.same} of {reloaded.rows} predictions and "
            f"{reloaded.same_texts} of {reloaded.texts} generated answers are the same; the largest difference between logits "
            f"is {reloaded.largest_difference:g}",
            soft_wrap=True,
        )
    console.print(f"\nLearning curves: {report.curves}. All results: {output / 'report.json'}.", soft_wrap=True)
    console.print("\nTo use a saved prompt:")
    console.print(_usage(report), markup=False, highlight=False, soft_wrap=True)


def _usage(report: Report) -> str:
    """Return a script that loads the saved soft prompt and asks the model a question."""
    return f'''  import softhooks
  from transformers import AutoModelForCausalLM, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained("{report.model_path}")
  model = AutoModelForCausalLM.from_pretrained("{report.model_path}")
  softhooks.load(model, "{report.reloaded[0].directory}")
  row = tokenizer({report.format.before + report.examples[0].text + report.format.after!r}, return_tensors="pt")
  print(tokenizer.decode(model.generate(**row, max_new_tokens=1)[0, -1]))'''


def _table(report: Report) -> Table:
    best = max(line.accuracy for line in report.lines)
    table = Table(
        title=f"{report.model}, {report.train_rows} training rows and {report.test_rows} test rows",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        box=box.SIMPLE,  # 80 columns
    )
    table.add_column("", no_wrap=True)
    for header in ("accuracy", "context", "trained", "saved bytes", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in report.lines:
        accuracy = f"{line.accuracy:.3f} ± {line.standard_error:.3f}"
        table.add_row(
            line.name,
            f"[bold]{accuracy}[/]" if line.accuracy == best else accuracy,
            f"{line.context_tokens:,}" if line.context_tokens else "",
            f"{line.trained:,}" if line.trained else "",
            "" if line.saved_bytes is None else f"{line.saved_bytes:,}",
            f"{line.seconds:.0f}" if line.seconds else "",
        )
    return table
