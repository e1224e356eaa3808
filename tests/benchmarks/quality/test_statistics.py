"""Standard errors, paired bootstrap and the choice of learning rates, on cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality.records import Record, Run
from benchmarks.quality.statistics import Comparison, Summary, choose_rate, compare, summarize


def _records(rows: np.ndarray, **settings: object) -> list[Record]:
    """One record for each row of a matrix, [seeds, rows]."""
    run = {"task": "t", "model": "m", "contestant": "c", "learning_rate": 0.1, **settings}
    return [Record(Run(**run, seed=seed), scores.tolist()) for seed, scores in enumerate(np.atleast_2d(rows))]


def _development(*scores: tuple[float, list[float]]) -> list[Record]:
    return [Record(Run("t", "m", "c", learning_rate=rate, part="development"), values) for rate, values in scores]


def test_standard_error_over_seeds() -> None:
    found = summarize(_records(np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])))
    assert found.mean == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert found.standard_error == pytest.approx(np.std([0.5, 1, 0.25], ddof=1) / math.sqrt(3))
    assert found.seeds == 3


def test_standard_error_over_rows_with_a_single_seed() -> None:
    found = summarize(_records(np.array([[1, 1, 1, 0]])))
    assert found.mean == 0.75
    assert found.standard_error == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_identical_scores_are_on_a_par() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (3, 200))
    found = compare(_records(rows), _records(rows))
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert found.not_better == 1
    assert found.sentence == "on a par within one standard error"


def test_shifted_scores_are_better_in_one_direction_and_worse_in_the_other() -> None:
    generator = np.random.default_rng(0)
    low = generator.normal(0.5, 0.1, (3, 200))
    high = low + generator.normal(0.1, 0.05, (3, 200))
    better, worse = compare(_records(high), _records(low)), compare(_records(low), _records(high))
    assert better.sentence == "better"
    assert worse.sentence == "worse"
    assert 0 < better.low < better.difference < better.high
    assert worse.low < worse.difference < worse.high < 0
    assert (better.not_better, worse.not_better) == (0, 1)
    assert better.difference == pytest.approx(0.1, abs=0.01)


def test_the_interval_is_that_of_the_normal_distribution() -> None:
    difference = np.random.default_rng(1).normal(0.02, 1, 400)
    found = compare(_records(difference), _records(np.zeros(400)))
    half = 1.96 * difference.std() / 20
    assert found.low == pytest.approx(difference.mean() - half, abs=0.01)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.01)


def test_pairing_removes_what_both_contestants_share() -> None:
    generator = np.random.default_rng(2)
    shared = generator.normal(0, 1, 300)
    first, second = shared + 0.05, shared + generator.normal(0, 0.05, 300)
    found = compare(_records(first), _records(second))
    assert found.high - found.low < 0.02
    shuffled = compare(_records(first), _records(generator.permutation(second)))
    assert shuffled.high - shuffled.low > 0.2


def test_95_percent_of_the_intervals_contain_the_true_difference() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        right = generator.random((2, 120)) < np.array([[0.7], [0.6]])
        found = compare(_records(right[0].astype(float)), _records(right[1].astype(float)), resamples=500)
        covered += found.low <= 0.1 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


@pytest.mark.parametrize("effect", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_contestants_whose_seeds_vary_are_seldom_told_apart(seeds: int, effect: float) -> None:
    generator = np.random.default_rng(6)
    told_apart = 0
    for _ in range(150):
        means = 0.6 + generator.normal(0, effect, (2, seeds, 1))
        first, second = (generator.random((2, seeds, 320)) < means).astype(float)
        told_apart += compare(_records(first), _records(second), resamples=300).clear_outcome != "on a par"
    assert told_apart / 150 <= 0.10


def test_a_difference_far_above_the_variation_between_seeds_is_found() -> None:
    generator = np.random.default_rng(7)
    means = np.array([0.75, 0.6]).reshape(2, 1, 1) + generator.normal(0, 0.01, (2, 3, 1))
    first, second = (generator.random((2, 3, 320)) < means).astype(float)
    assert compare(_records(first), _records(second)).clear_outcome == "better"


def test_seeds_are_averaged_before_rows_are_resampled() -> None:
    """Two seeds whose errors cancel out in every row leave nothing to resample."""
    noise = np.random.default_rng(4).normal(0, 1, 50)
    noise -= noise.mean()  # so that both seeds have the same score
    found = compare(_records(np.stack([0.5 + noise, 0.5 - noise])), _records(np.full(50, 0.4)))
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_the_bootstrap_is_reproducible() -> None:
    rows = np.random.default_rng(5).integers(0, 2, (2, 1, 60)).astype(float)
    assert compare(_records(rows[0]), _records(rows[1])) == compare(_records(rows[0]), _records(rows[1]))


@pytest.mark.parametrize("sizes", [(10, 11), (11, 10)])
def test_different_rows_cannot_be_compared(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{sizes[0]} and {sizes[1]} rows"):
        compare(_records(np.zeros(sizes[0])), _records(np.zeros(sizes[1])))


def test_different_rows_of_one_contestant_are_refused() -> None:
    mixed = [*_records(np.zeros(10)), *_records(np.zeros(11))]
    with pytest.raises(ValueError, match="10 and 11 rows"):
        compare(mixed, mixed)


@pytest.mark.parametrize(
    ("difference", "low", "high", "sentence", "clear"),
    [
        (0.01, -0.02, 0.04, "on a par within one standard error", "on a par"),
        (0.01, 0.001, 0.02, "on a par within one standard error", "on a par"),
        (0.03, -0.01, 0.07, "better, but the 95% interval contains 0", "on a par"),
        (0.03, 0.01, 0.05, "better", "better"),
        (-0.03, -0.07, 0.01, "worse, but the 95% interval contains 0", "on a par"),
        (-0.03, -0.05, -0.01, "worse", "worse"),
    ],
)
def test_outcomes(difference: float, low: float, high: float, sentence: str, clear: str) -> None:
    """The standard error of the difference is 0.02."""
    error = 0.02 / math.sqrt(2)
    found = Comparison(Summary(0.5 + difference, error, 3), Summary(0.5, error, 3), low, high, 0.0)
    assert found.standard_error == pytest.approx(0.02)
    assert found.sentence == sentence
    assert found.clear_outcome == clear


def test_the_best_learning_rate_is_chosen() -> None:
    assert choose_rate(_development((0.1, [1, 0]), (0.01, [1, 1]), (0.001, [0, 0]))) == 0.01


def test_the_mean_over_seeds_decides() -> None:
    assert choose_rate(_development((0.1, [1, 1]), (0.1, [0, 0]), (0.01, [1, 0]), (0.01, [1, 1]))) == 0.01


def test_the_smallest_of_equal_rates_is_chosen() -> None:
    assert choose_rate(_development((0.1, [1, 0]), (0.01, [0, 1]), (0.03, [1, 0]))) == 0.01


def test_test_rows_do_not_choose_a_learning_rate() -> None:
    with pytest.raises(ValueError, match="development"):
        choose_rate([Record(Run("t", "m", "c", learning_rate=0.1), [1.0])])
    with pytest.raises(ValueError, match="no development records"):
        choose_rate([])
