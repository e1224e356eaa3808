"""The report's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.quality.records import Record
from benchmarks.quality.standings import Cell, Standings, label_of

MISSING = "–"  # noqa: RUF001  # an en dash

Cells = Mapping[int, Cell | None]
"""The cells of a contestant for each number of shots."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first `left` columns are aligned on the left, and the others on the right."""
    rule = ["---" if number < left else "---:" for number in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def scores_table(standings: Standings, task: str, model: str) -> str:
    """Return the table of a task and a model: contestants in rows, shots in columns."""
    table: dict[str, Cells] = {
        name: {shots: standings.cell(task, model, name, shots) for shots in (0, *standings.profile.shots)}
        for name in standings.contestants(task, model)
    }
    columns = [shots for shots in (0, *standings.profile.shots) if any(cells[shots] for cells in table.values())]
    best = {shots: _best([cells[shots] for cells in table.values()]) for shots in columns}
    rows = []
    for name, cells in table.items():
        shown = {shots: cells[shots] for shots in columns}
        rows.append([label_of(name), *(_score(cell, best[shots]) for shots, cell in shown.items()), *_costs(shown)])
    costs = ["seeds", "context", "trained", "saved bytes", "seconds", "learning rate"]
    return markdown_table(["contestant", *(f"{shots} shots" for shots in columns), *costs], rows)


def _best(cells: Sequence[Cell | None]) -> float | None:
    """Return the best mean score of a column; None if there are not at least two to compare."""
    means = [cell.summary.mean for cell in cells if cell is not None and cell.summary is not None]
    return max(means) if len(means) > 1 else None


def _score(cell: Cell | None, best: float | None) -> str:
    """Return mean and standard error; empty without planned runs, and a dash without results."""
    if cell is None:
        return ""
    if cell.summary is None:
        return MISSING
    return f"**{cell.summary}**" if cell.summary.mean == best else str(cell.summary)


def _costs(cells: Cells) -> list[str]:
    """Return seeds, tokens of the context, trained parameters, saved bytes, seconds and learning rates of a row."""
    found = [cell for cell in cells.values() if cell is not None and cell.records]
    if not found:
        return [MISSING] * 6
    return [
        _each(found, _seeds),
        _each(found, lambda cell: _count(cell, lambda record: record.context_tokens)),
        _each(found, lambda cell: _count(cell, lambda record: record.trained)),
        _each(found, lambda cell: _count(cell, lambda record: record.saved_bytes)),
        _each(found, lambda cell: f"{_mean(cell, lambda record: record.seconds):,.1f}"),
        _each(found, lambda cell: f"{rate:g}" if (rate := cell.records[0].run.learning_rate) else ""),
    ]


def _seeds(cell: Cell) -> str:
    count = len(cell.records)
    return str(count) if count == cell.planned else f"{count} of {cell.planned}"


def _each(cells: Sequence[Cell], text: Callable[[Cell], str]) -> str:
    """Return the texts of the cells in the order of the shots, or a single text if all are equal."""
    texts = [text(cell) for cell in cells]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _count(cell: Cell, value: Callable[[Record], float]) -> str:
    """Return a mean without decimals; empty if it is 0, as the trained parameters of a context."""
    mean = _mean(cell, value)
    return f"{mean:,.0f}" if mean else ""


def _mean(cell: Cell, value: Callable[[Record], float]) -> float:
    return float(np.mean([value(record) for record in cell.records]))
