"""Means and standard errors over seeds, comparisons of two contestants by paired bootstrap, and the choice of learning rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.quality.records import Record

RESAMPLES = 10_000
CONFIDENCE = 0.95

Outcome = Literal["better", "worse", "on a par"]


@dataclass(frozen=True)
class Summary:
    """The mean score of some runs that differ only in the seed.

    Attributes:
        mean: the mean over seeds.
        standard_error: of the mean: over seeds, or over rows if there is a single seed.
        seeds: the number of seeds.
    """

    mean: float
    standard_error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Comparison:
    """The difference between the mean scores of two contestants on the same rows.

    Attributes:
        first, second: the mean scores of the two contestants.
        low, high: the 95% interval of the difference, from a bootstrap over rows, and widened by the variation between seeds.
        not_better: the share of resamples in which the first contestant is not better than the second.
    """

    first: Summary
    second: Summary
    low: float
    high: float
    not_better: float

    @property
    def difference(self) -> float:
        """How much higher the first contestant's score is."""
        return self.first.mean - self.second.mean

    @property
    def standard_error(self) -> float:
        """The standard error of the difference, from the standard errors of both scores."""
        return float(np.hypot(self.first.standard_error, self.second.standard_error))

    @property
    def is_significant(self) -> bool:
        """Whether the 95% interval does not contain 0."""
        return not self.low <= 0 <= self.high

    @property
    def outcome(self) -> Outcome:
        """Whether the first contestant is better or worse than the second by more than one standard error."""
        if abs(self.difference) <= self.standard_error:
            return "on a par"
        return "better" if self.difference > 0 else "worse"

    @property
    def clear_outcome(self) -> Outcome:
        """The outcome, but `on a par` if the 95% interval contains 0."""
        return self.outcome if self.is_significant else "on a par"

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if self.outcome == "on a par":
            return "on a par within one standard error"
        return self.outcome if self.is_significant else f"{self.outcome}, but the 95% interval contains 0"

    def __str__(self) -> str:
        return f"{self.difference:+.3f}, 95% interval {self.low:+.3f} to {self.high:+.3f}"


def summarize(records: Sequence[Record]) -> Summary:
    """Return the mean score over seeds and its standard error; with a single seed, the standard error over rows."""
    if not records:
        raise ValueError("there are no records to summarize; pass at least one.")
    values = [record.score for record in records] if len(records) > 1 else records[0].scores
    error = float(stats.sem(values)) if len(values) > 1 else float("nan")
    return Summary(float(np.mean([record.score for record in records])), error, len(records))


def compare(
    first: Sequence[Record], second: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare two contestants by a paired bootstrap: average each row's score over seeds, and resample rows.

    That interval shows how much the difference depends on the rows that were drawn. With several seeds, it is widened, if
    necessary, to the t interval of both sources of variation: see `_seed_interval`.

    Args:
        first, second: the records of each contestant, one for each seed, all on the same rows.
        resamples: the number of resamples.
        seed: of the resampling.
    """
    paired = row_means(first), row_means(second)
    if len(paired[0]) != len(paired[1]):
        raise ValueError(
            f"the records have {len(paired[0])} and {len(paired[1])} rows; a paired comparison needs the scores of the "
            "same rows. Run both contestants again on the same version of the task."
        )
    result = stats.bootstrap(
        (paired[0] - paired[1],),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(paired[0])),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval: Any = result.confidence_interval
    wide = _seed_interval(first, second, paired[0] - paired[1])
    low, high = min(float(interval.low), wide[0]), max(float(interval.high), wide[1])
    not_better = float(np.mean(result.bootstrap_distribution <= 0))
    return Comparison(summarize(first), summarize(second), low, high, not_better)


def _seed_interval(
    first: Sequence[Record], second: Sequence[Record], rows: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Return the t interval of the mean difference, whose variance is the sum of the variances over rows and over seeds.

    The differences are paired by seed. The degrees of freedom are those of Welch and Satterthwaite. With fewer than two common
    seeds, the interval is the difference itself.
    """
    other = {record.run.seed: record.score for record in second}
    by_seed = [record.score - other[record.run.seed] for record in first if record.run.seed in other]
    mean = float(rows.mean())
    if len(by_seed) < 2:
        return mean, mean
    variances = np.array([np.var(rows, ddof=1) / len(rows), np.var(by_seed, ddof=1) / len(by_seed)])
    if not variances.any():
        return mean, mean
    freedom = variances.sum() ** 2 / (variances[0] ** 2 / (len(rows) - 1) + variances[1] ** 2 / (len(by_seed) - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variances.sum()))
    return mean - half, mean + half


def row_means(records: Sequence[Record]) -> npt.NDArray[np.float64]:
    """Return each row's mean score over the seeds."""
    sizes = sorted({len(record.scores) for record in records})
    if len(sizes) != 1:
        raise ValueError(
            f"records of one contestant have {' and '.join(map(str, sizes)) or 'no'} rows; all must have the same rows. "
            "Delete the results of the older version of the task and run it again."
        )
    means: npt.NDArray[np.float64] = np.mean([record.scores for record in records], axis=0)
    return means


def rate_scores(development: Sequence[Record]) -> dict[float, float]:
    """Return the mean score on the development rows for each learning rate, in ascending order of the rates."""
    scores: dict[float, list[float]] = defaultdict(list)
    for record in development:
        if record.run.part != "development":
            raise ValueError(
                "a record of test rows is among those for choosing a learning rate; pass development records only."
            )
        scores[record.run.learning_rate].append(record.score)
    return {rate: float(np.mean(scores[rate])) for rate in sorted(scores)}


def choose_rate(development: Sequence[Record]) -> float:
    """Return the learning rate with the highest mean score on the development rows; of equal ones, the smallest rate."""
    scores = rate_scores(development)
    if not scores:
        raise ValueError(
            "there are no development records to choose a learning rate from; run the development rows first."
        )
    return max(scores, key=lambda rate: (round(scores[rate], 9), -rate))
