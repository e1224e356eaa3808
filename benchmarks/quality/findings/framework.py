"""A finding of a paper: the runs that test it, the verdict on it, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.findings.settings import RATES, SEEDS, SHOTS, STEPS, TASK
from benchmarks.quality.plots import Point, plot_bars, plot_lines
from benchmarks.quality.records import Record, Run, Store
from benchmarks.quality.statistics import Summary, compare, summarize

Judgment = Literal["held", "contradicted", "not confirmed", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """Whether a finding held.

    Attributes:
        judgment: `contradicted` if a comparison came out clearly the other way, `not confirmed` if there was no clear difference
            where one was expected, and `not measured` if runs are missing.
        sentence: the comparisons behind the verdict, with their numbers.
    """

    judgment: Judgment
    sentence: str


_WORST_FIRST: tuple[Judgment, ...] = ("contradicted", "not confirmed", "held")


@dataclass(frozen=True)
class Arm:
    """One of the compared settings.

    Attributes:
        label: its name in the plot and in sentences.
        runs: one for each seed.
    """

    label: str
    runs: tuple[Run, ...]

    def records(self, store: Store) -> list[Record] | None:
        """Return the results, or None if any is missing."""
        found = [record for run in self.runs if (record := store.get(run)) is not None]
        return found if len(found) == len(self.runs) else None


@dataclass(frozen=True)
class Expect:
    """A comparison that a finding predicts.

    Attributes:
        first, second: the compared settings.
        outcome: `better`, if the first should be better by more than one standard error, with a 95% interval above 0; or
            `not worse`, if the second should not be better by that much.
    """

    first: Arm
    second: Arm
    outcome: Literal["better", "not worse"] = "better"

    def judge(self, store: Store) -> Verdict:
        """Compare the settings."""
        first, second = self.first.records(store), self.second.records(store)
        if first is None or second is None:
            missing = [arm.label for arm, records in ((self.first, first), (self.second, second)) if records is None]
            return Verdict("not measured", f"results are missing for {' and '.join(missing)}")
        found = compare(first, second)
        clear = found.clear_outcome
        judgment: Judgment = "held"
        if clear == "worse":
            judgment = "contradicted"
        elif clear == "on a par" and self.outcome == "better":
            judgment = "not confirmed"
        words = "no clear difference" if clear == "on a par" else clear
        return Verdict(
            judgment,
            f"{self.first.label} ({found.first}) against {self.second.label} ({found.second}): {words} ({found})",
        )


@dataclass(frozen=True)
class Finding:
    """A finding of a paper.

    Attributes:
        name: of the plot's file.
        paper: authors, year and arXiv number.
        claim: what the paper found, as a sentence about the compared settings.
        arms: the compared settings.
        judge: reads the results and gives the verdict.
        plot: writes a PNG file of the results that are there; returns False if there are none.
    """

    name: str
    paper: str
    claim: str
    arms: tuple[Arm, ...]
    judge: Callable[[Store], Verdict]
    plot: Callable[[Store, Path], bool]

    @property
    def runs(self) -> Sequence[Run]:
        """All runs of the finding."""
        return [run for arm in self.arms for run in arm.runs]


def arm(
    label: str,
    contestant: str,
    model: str,
    *,
    rate: str | None = None,
    shots: int = SHOTS,
    steps: int = STEPS,
    task: str = TASK,
    **options: Any,
) -> Arm:
    """Make a setting with one run for each seed.

    Args:
        rate: the entry in `RATES`, if it is not that of the contestant. Without steps, there is no learning rate.
        task: the name of the task.
        options: the options of the run; without any, the runs are those of the main comparison, and are not repeated.
    """
    learning_rate = RATES[model, rate or contestant] if steps else 0.0
    return Arm(
        label,
        tuple(
            Run(task, model, contestant, shots, steps, learning_rate, seed, options=tuple(sorted(options.items())))
            for seed in SEEDS
        ),
    )


def all_hold(*expected: Expect) -> Callable[[Store], Verdict]:
    """Make the judge of a finding that holds if all its comparisons come out as expected."""

    def judge(store: Store) -> Verdict:
        verdicts = [one.judge(store) for one in expected]
        missing = [verdict.sentence for verdict in verdicts if verdict.judgment == "not measured"]
        if missing:
            return Verdict("not measured", _sentence(dict.fromkeys(missing)))
        judgments = {verdict.judgment for verdict in verdicts}
        worst = next(one for one in _WORST_FIRST if one in judgments)
        return Verdict(worst, _sentence(verdict.sentence for verdict in verdicts))

    return judge


def bars(arms: Sequence[Arm], title: str) -> Callable[[Store, Path], bool]:
    """Make a plot with one line for each setting."""

    def plot(store: Store, path: Path) -> bool:
        scores = {one.label: summary for one in arms if (summary := _summary(one, store)) is not None}
        if scores:
            plot_bars(scores, path, title=title, score=score_name(_records(arms, store)))
        return bool(scores)

    return plot


def lines(series: Mapping[str, Mapping[int, Arm]], title: str, xlabel: str) -> Callable[[Store, Path], bool]:
    """Make a plot against a number, with one curve for each label."""

    def plot(store: Store, path: Path) -> bool:
        points = {
            label: [Point(x, summary) for x, one in arms.items() if (summary := _summary(one, store)) is not None]
            for label, arms in series.items()
        }
        points = {label: found for label, found in points.items() if found}
        if points:
            everyone = [one for arms in series.values() for one in arms.values()]
            score = score_name(_records(everyone, store))
            plot_lines(points, path, title=title, score=score, xlabel=xlabel)
        return bool(points)

    return plot


def score_name(records: Sequence[Record]) -> str:
    """Return `accuracy` if all scores are 0 or 1, else `ROUGE-L`."""
    return "accuracy" if all(score in (0, 1) for record in records for score in record.scores) else "ROUGE-L"


def _summary(one: Arm, store: Store) -> Summary | None:
    records = one.records(store)
    return None if records is None else summarize(records)


def _records(arms: Sequence[Arm], store: Store) -> list[Record]:
    return [record for one in arms for record in one.records(store) or ()]


def _sentence(parts: Any) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."
