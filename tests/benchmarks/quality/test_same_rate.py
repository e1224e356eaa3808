"""softhooks' methods are also tried with the learning rates that were chosen for PEFT's versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.comparisons import against_peft
from benchmarks.quality.models import SMOLLM2
from benchmarks.quality.plan import Profile, final_runs, search_runs
from benchmarks.quality.records import Record, Run, Store
from benchmarks.quality.same_rate import same_rate_records, same_rate_runs
from benchmarks.quality.standings import Standings

OWN, PEFT = "prompt_tuning", "peft_prompt_tuning"
PROFILE = Profile(
    "made up",
    tasks={SMOLLM2: ("docstrings", "synopses")},
    searched=("docstrings",),
    contestants={SMOLLM2: ("lora", OWN, PEFT)},
    shots=(8, 32),
    seeds={SMOLLM2: 2},
    steps={SMOLLM2: lambda shots: 100},
)
BEST = {OWN: 0.03, PEFT: 0.1, "lora": 0.001}


def _store(folder: Path, best: dict[str, float]) -> Store:
    """Fill a store with the search, in which each contestant has the given best rate, and with the test runs."""
    store = Store(folder)
    while missing := store.missing(search_runs(PROFILE, store)):
        for run in missing:
            store.put(_record(run, 0.5 - abs(run.learning_rate - best[run.contestant])))
    for run in final_runs(PROFILE, store):
        store.put(_record(run, 0.8 if run.contestant == PEFT else 0.5))
    return store


def _record(run: Run, score: float) -> Record:
    return Record(run, [score] * 10)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return _store(tmp_path, BEST)


def test_a_method_is_tried_with_the_rate_of_pefts_version(store: Store) -> None:
    runs = same_rate_runs(PROFILE, store)
    assert {(run.contestant, run.learning_rate, run.shots, run.part) for run in runs} == {(OWN, 0.1, 32, "test")}
    assert {(run.task, run.seed) for run in runs} == {
        (task, seed) for task in PROFILE.tasks[SMOLLM2] for seed in (0, 1)
    }


def test_equal_rates_need_no_runs(tmp_path: Path) -> None:
    assert same_rate_runs(PROFILE, _store(tmp_path, {**BEST, OWN: 0.1})) == []


def test_before_the_rates_are_chosen_there_are_no_runs(tmp_path: Path) -> None:
    assert same_rate_runs(PROFILE, Store(tmp_path)) == []


def test_the_comparison_is_shown_when_all_seeds_are_there(store: Store) -> None:
    def labels() -> list[str]:
        return [own for _, own, _, _ in against_peft(Standings(store, PROFILE), "docstrings", SMOLLM2, 32)]

    first, second = (run for run in same_rate_runs(PROFILE, store) if run.task == "docstrings")
    store.put(_record(first, 0.8))
    assert same_rate_records(PROFILE, store, "docstrings", SMOLLM2, PEFT) == []
    assert labels() == ["prompt tuning (softhooks)"]
    store.put(_record(second, 0.8))
    assert labels() == ["prompt tuning (softhooks)", "prompt tuning (softhooks), with PEFT's learning rate"]
    *_, found = against_peft(Standings(store, PROFILE), "docstrings", SMOLLM2, 32)[-1]
    assert found.difference == pytest.approx(0.0)
    assert against_peft(Standings(store, PROFILE), "docstrings", SMOLLM2, 8)[-1][1] == "prompt tuning (softhooks)"
