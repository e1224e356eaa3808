"""The report's comparisons: softhooks' methods with LoRA, and with PEFT's versions of them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.plan import search_shots
from benchmarks.quality.records import Record
from benchmarks.quality.same_rate import same_rate_records
from benchmarks.quality.standings import LORA, Standings, is_softhooks, label_of
from benchmarks.quality.statistics import CONFIDENCE, RESAMPLES, Comparison, compare
from benchmarks.quality.tables import MISSING, markdown_table

Compared = tuple[int, str, str, Comparison]
"""A number of shots, two contestants, and their comparison."""

COMPARISONS = (
    f"The difference is the first score minus the second. Its {CONFIDENCE:.0%} interval is from a paired bootstrap: each row's "
    f"scores are averaged over seeds, and rows are resampled {RESAMPLES:,} times. With several seeds, it is widened, if "
    "necessary, to the t interval of the variation over rows and over seeds (paired by seed; Welch's degrees of freedom). "
    '"Not better" is the share of resamples in '
    "which the first contestant is not better than the second. Two contestants are on a par if the difference is at most one "
    "standard error, which is computed from the standard errors of both scores. Where the learning rates that were chosen for a "
    "method and for PEFT's version of it differ, the method is also compared with PEFT's rate: a difference that disappears then "
    "comes from the choice of the rate, on development rows with one seed."
)


def comparisons(standings: Standings) -> list[str]:
    """Return a section for each task and model: sentences about LoRA, and a table."""
    parts = []
    for task, model in standings.pairs():
        rows, sentences = [], []
        for shots in standings.profile.shots:
            lora, best = against_lora(standings, task, model, shots), standings.best_method(task, model, shots)
            if lora is None or best is None:
                sentences.append(f"{shots} shots: {MISSING} (there are no results of LoRA or of softhooks' methods)")
            else:
                _, first, second, found = lora
                sentences.append(
                    f"{shots} shots: {first}, the best softhooks method on the {best[1]} rows, against {second}: "
                    f"{found.sentence} ({found}). {level_with_lora(standings, task, model, shots)}"
                )
                rows.append(lora)
            rows += against_peft(standings, task, model, shots)
        parts += [f"### {task}, {model}", "\n".join(f"- {sentence}" for sentence in sentences)]
        if rows:
            parts.append(comparison_table(rows))
    return parts


def against_peft(standings: Standings, task: str, model: str, shots: int) -> list[Compared]:
    """Compare each method of softhooks with PEFT's version of it, where both have results.

    If the two have different learning rates, the method is also compared with PEFT's rate, where there are results.
    """
    found = []
    for peft, contestant in CONTESTANTS.items():
        if contestant.twin is not None:
            own, other = common_records(standings, task, model, contestant.twin, peft, shots)
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
    own, lora = common_records(standings, task, model, best[0], LORA, shots)
    if not (own and lora):
        return None
    return shots, label_of(best[0]), label_of(LORA), compare(own, lora)


def level_with_lora(standings: Standings, task: str, model: str, shots: int) -> str:
    """Say which methods of softhooks are better than LoRA or on a par with it, on the test rows."""
    outcomes: dict[str, list[str]] = {"better": [], "on a par": [], "worse": []}
    for name in filter(is_softhooks, standings.contestants(task, model)):
        own, lora = common_records(standings, task, model, name, LORA, shots)
        if own and lora:
            found = compare(own, lora)
            outcomes[found.outcome].append(f"{label_of(name)}, {found.first}")
    better, level, worse = outcomes.values()
    sentences = [f"Better on the test rows: {'; '.join(better)}."] if better else []
    sentences += [f"On a par on the test rows: {'; '.join(level)}."] if level else []
    if worse and not sentences:
        return "All methods of softhooks are worse on the test rows."
    return " ".join(sentences)


def common_records(
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
