"""The report's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.plan import search_shots
from benchmarks.quality.records import Record
from benchmarks.quality.same_rate import same_rate_records
from benchmarks.quality.standings import LORA, Cell, Standings, label_of
from benchmarks.quality.statistics import Comparison, compare

MISSING = "–"  # noqa: RUF001  # an en dash

Compared = tuple[int, str, str, Comparison]
"""A number of shots, two contestants, and their comparison."""

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


def against_peft(standings: Standings, task: str, model: str, shots: int) -> list[Compared]:
    """Compare each method of softhooks with PEFT's version of it, where both have results.

    If the two have different learning rates, the method is also compared with PEFT's rate, where there are results.
    """
    found = []
    for peft, contestant in CONTESTANTS.items():
        if contestant.twin is not None:
            own, other = _common(standings, task, model, contestant.twin, peft, shots)
            if own and other:
                found.append((shots, label_of(contestant.twin), label_of(peft), compare(own, other)))
            same = same_rate_records(standings.profile, standings.store, task, model, peft)
            if other and same and shots == search_shots(standings.profile):
                label = f"{label_of(contestant.twin)}, with PEFT's learning rate"
                found.append((shots, label, label_of(peft), compare(same, other)))
    return found


def against_lora(standings: Standings, task: str, model: str, shots: int) -> Compared | None:
    """Compare the best method of softhooks with LoRA, or return None if one of them has no results."""
    best = standings.best_method(task, model, shots)
    if best is None:
        return None
    own, lora = _common(standings, task, model, best[0], LORA, shots)
    if not (own and lora):
        return None
    return shots, label_of(best[0]), label_of(LORA), compare(own, lora)


def _common(
    standings: Standings, task: str, model: str, first: str, second: str, shots: int
) -> tuple[list[Record], list[Record]]:
    """Return the results of two contestants with the seeds that both have."""
    own, other = (_records(standings, task, model, name, shots) for name in (first, second))
    seeds = {record.run.seed for record in own} & {record.run.seed for record in other}
    return [r for r in own if r.run.seed in seeds], [r for r in other if r.run.seed in seeds]


def _records(standings: Standings, task: str, model: str, contestant: str, shots: int) -> list[Record]:
    cell = standings.cell(task, model, contestant, shots)
    return [] if cell is None else cell.records


def comparison_table(compared: Sequence[Compared]) -> str:
    """Return a table of comparisons."""
    header = ["first", "second", "outcome", "shots", "first score", "second score", "difference", "95% interval"]
    rows = [
        [
            first,
            second,
            found.sentence,
            str(shots),
            str(found.first),
            str(found.second),
            f"{found.difference:+.3f}",
            f"{found.low:+.3f} to {found.high:+.3f}",
            f"{found.not_better:.1%}",
        ]
        for shots, first, second, found in compared
    ]
    return markdown_table([*header, "not better"], rows, left=3)
