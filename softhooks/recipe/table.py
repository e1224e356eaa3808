"""Read the training rows from a file, find the columns, and split off validation rows."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softhooks.errors import OptionError, SoftHooksError
from softhooks.recipe.options import TrainOptions

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {
    ".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv", ".tsv": "from_csv", ".parquet": "from_parquet",
}  # fmt: skip
"""The method of `datasets.Dataset` that reads files with a suffix."""

MESSAGES = "messages"
TEXTS = ("text", "prompt", "question", "input", "sentence")
ANSWERS = ("label", "answer", "completion", "target", "output")
"""The columns that are used if `--text` and `--label` are not given: the first one that the table has."""


@dataclass(frozen=True)
class Table:
    """The rows of a file and their roles.

    Attributes:
        train, validation: the rows; `validation` is None if there are none.
        text: the format of the text before the answer, such as `{text}`; None if the rows are chats.
        label: the column of answers; None if the rows are chats.
    """

    train: Dataset
    validation: Dataset | None
    text: str | None
    label: str | None

    @property
    def is_chat(self) -> bool:
        """Whether the rows are chats."""
        return self.text is None

    def parts(self) -> list[Dataset]:
        """Return the training rows and the validation rows."""
        return [self.train] if self.validation is None else [self.train, self.validation]

    def render(self, row: dict[str, Any]) -> str:
        """Fill in the text before the answer."""
        return str(self.text).format_map(row)

    def answer(self, rows: Dataset, value: Any) -> str:
        """Return a label as text; a `ClassLabel` is replaced by its name."""
        names = getattr(rows.features[self.label], "names", None)
        return str(names[value] if names is not None and isinstance(value, int) and value >= 0 else value)


def read_table(options: TrainOptions) -> Table:
    """Read the rows, and check the columns.

    Raises:
        OptionError: a file cannot be read, a column is missing, or a row has an empty cell.
    """
    rows = _read(options.data)
    text, label = _columns(rows, options)
    needed = [MESSAGES] if text is None else [*_fields(text), str(label)]
    if isinstance(options.validation, Path):
        train, validation = rows, _read(options.validation)
        _require_columns(validation, needed, options.validation)
        _require_cells(validation, needed, options.validation)
    else:
        train, validation = _split(rows, options.validation, options.seed)
    _require_cells(rows, needed, options.data)
    return Table(train, validation, text, label)


def _read(path: Path) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise SoftHooksError(
            "`softhooks train` reads tables with the package `datasets`, which is not installed.",
            'Install it: pip install "softhooks[train]".',
        ) from error
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        found = "there is no such file" if not path.is_file() else f"its suffix is {path.suffix or 'missing'!r}"
        raise OptionError(
            f"{path} cannot be read as a table: {found}.",
            "Give a file with one of these suffixes.",
            suffixes=", ".join(READERS),
        )
    given = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = getattr(datasets.Dataset, reader)(str(path), **given)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        raise OptionError(
            f"{path} cannot be read as a table.",
            "In a JSONL file, each line is an object, and all objects have the same columns.",
            error=" ".join(f"{type(cause).__name__}: {cause}".split())[:300],
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    if not len(rows):
        raise OptionError(f"{path} has no rows.")
    return rows


def _columns(rows: Dataset, options: TrainOptions) -> tuple[str | None, str | None]:
    """Return the format of the text and the column of the answers; None and None for chats."""
    names = rows.column_names
    is_chat = MESSAGES in names and options.text is None and options.label is None
    if is_chat and options.task == "language-model":
        return None, None
    text = options.text or next((name for name in TEXTS if name in names), None)
    label = options.label or next((name for name in ANSWERS if name in names and name != text), None)
    if text is None or label is None:
        missing = "text" if text is None else "label"
        raise OptionError(
            f"{options.data} has no column for the {missing}: no column has one of the usual names.",
            f"Name the column with --{missing}.",
            columns=", ".join(names),
            usual_names=", ".join(TEXTS if text is None else ANSWERS),
        )
    form = text if "{" in text else f"{{{text}}}"
    _require_columns(rows, [*_fields(form), label], options.data)
    return form, label


def _fields(form: str) -> list[str]:
    """Return the columns that a format names."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
    except ValueError as error:
        raise OptionError(
            f"--text is {form!r}, which is not a format: {error}.", "Double a brace that is part of the text: {{ or }}."
        ) from error
    plain = [name for name in names if name.isidentifier()]
    if not names or len(plain) < len(names):
        raise OptionError(f"--text is {form!r}; braces must contain the name of a column, as in '{{text}}'.")
    return names


def _require_columns(rows: Dataset, needed: Sequence[str], path: Path) -> None:
    absent = [name for name in needed if name not in rows.column_names]
    if absent:
        raise OptionError(
            f"{path} has no column {absent[0]!r}.",
            "Name the columns with --text (a column, or a format such as '{premise} {hypothesis}') and --label.",
            columns=", ".join(rows.column_names),
        )


def _require_cells(rows: Dataset, needed: Sequence[str], path: Path) -> None:
    for name in needed:
        for number, value in enumerate(rows[name]):
            if value is None or value == "" or value == []:
                raise OptionError(f"row {number} of {path} has no {name!r}; every row needs one.", row=rows[number])


def _split(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Shuffle the rows, and split off a share of at least one row; None if the share is 0."""
    if share == 0:
        return rows, None
    if len(rows) < 2:
        raise OptionError(
            "the table has one row, so no row can be split off for validation.", "Add rows, or pass `--validation 0`."
        )
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]
