"""The order of a profile's runs, the choice of prompts and learning rates, and the files of results."""

from pathlib import Path

import pytest

from benchmarks.quality import models
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.plan import (
    EXTENSIONS,
    FULL,
    SMALL,
    STRONG,
    at_an_end,
    baseline_runs,
    chosen_rate,
    final_runs,
    prompt_runs,
    prompted_runs,
    search_runs,
    shots_of,
)
from benchmarks.quality.records import Record, Run, Store


class TestPlan:
    def test_no_learning_rate_is_chosen_on_test_rows(self) -> None:
        assert {run.part for run in [*search_runs(FULL, Store(Path("none"))), *prompt_runs(FULL)]} == {"development"}

    def test_test_runs_wait_for_the_learning_rate_and_use_the_best(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        assert final_runs(SMALL, store) == []
        searched = [run for run in search_runs(SMALL, store) if run.contestant == "lora"]
        for run in searched[:-1]:
            store.put(Record(run, [0.5, 0.5]))
        assert chosen_rate(SMALL, store, models.MINILM, "lora") is None
        store.put(Record(searched[-1], [0.0, 0.5]))
        assert chosen_rate(SMALL, store, models.MINILM, "lora") is None, "the lowest is best: a lower one is tried"
        [lower] = store.missing(run for run in search_runs(SMALL, store) if run.contestant == "lora")
        assert lower.learning_rate < min(run.learning_rate for run in searched)
        store.put(Record(lower, [0.0, 0.5]))
        assert chosen_rate(SMALL, store, models.MINILM, "lora") == searched[0].learning_rate
        assert not at_an_end(SMALL, store, models.MINILM, "lora")
        tested = final_runs(SMALL, store)
        assert {run.learning_rate for run in tested} == {searched[0].learning_rate}
        assert [run.seed for run in tested] == [0, 1]

    def test_the_full_profile_has_every_contestant_with_every_number_of_rows(self) -> None:
        runs = {(run.model, run.contestant) for run in search_runs(FULL, Store(Path("none")))}
        for name, contestant in CONTESTANTS.items():
            assert ((models.MINILM, name) in runs) == (contestant.encoder_rates is not None)
            assert ((models.SMOLLM2, name) in runs) == (contestant.decoder_rates is not None)
        baselines = {(run.task, run.contestant) for run in baseline_runs(FULL)}
        assert {("glosses", "tfidf"), ("synopses", "first_sentence")} <= baselines

    def test_contestants_outside_the_core_are_tuned_with_one_number_of_rows(self) -> None:
        """A baseline such as the head alone belongs to the core, so every comparison of sizes has one."""
        assert shots_of(FULL, "glosses", models.SMOLLM2, "prompt_tuning") == FULL.shots
        assert shots_of(FULL, "glosses", models.MINILM, "head") == FULL.shots
        assert shots_of(FULL, "docstrings", models.MINILM, "head") == (32,)
        assert shots_of(FULL, "glosses", models.MINILM, "p_tuning_v2") == (32,)
        assert shots_of(FULL, "synopses", models.SMOLLM2, "p_tuning") == ()
        assert {shots_of(FULL, "synopses", models.SMOLLM2, name) for name in (*STRONG, "lora")} == {(32,)}

    def test_the_search_for_learning_rates_ends(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        rates = []
        for _ in range(EXTENSIONS + 2):
            for run in store.missing(run for run in search_runs(SMALL, store) if run.contestant == "lora"):
                store.put(Record(run, [run.learning_rate]))
                rates.append(run.learning_rate)
        assert len(rates) == 3 + EXTENSIONS
        assert chosen_rate(SMALL, store, models.MINILM, "lora") == max(rates)
        assert at_an_end(SMALL, store, models.MINILM, "lora")

    @pytest.mark.parametrize(("best", "shots"), [(4, (32,)), (5, (8, 32, 150))])
    def test_prompts_are_chosen_on_development_rows_and_used_with_every_seed(
        self, best: int, shots: tuple[int, ...], tmp_path: Path
    ) -> None:
        """A prompt of one or two examples of each class does not depend on the number of rows."""
        store = Store(tmp_path)
        assert prompted_runs(FULL, store) == []
        few = [run for run in prompt_runs(FULL) if (run.task, run.contestant) == ("glosses", "few_shot")]
        for run in few:
            store.put(Record(run, [1.0 if run is few[best] else 0.5]))
        tested = prompted_runs(FULL, store)
        assert {run.options for run in tested} == {few[best].options}
        assert sorted((run.shots, run.seed) for run in tested) == [(k, s) for k in shots for s in (0, 1, 2)]
        assert {run.part for run in tested} == {"test"}


class TestStore:
    def test_a_record_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        run = Run(
            "glosses", "smollm2", "prompt_tuning", 8, 100, 0.02, 1, options=(("init", "random"), ("layers", (1, 2)))
        )
        record = Record(run, [1.0, 0.0], trained=5, losses=[0.1], versions={"torch": "x"}, extra={"tokens": 3})
        store.put(record)
        assert store.missing([run, run]) == []
        got = store.get(run)
        assert got is not None
        assert got.scores == [1.0, 0.0]
        assert got.score == 0.5
        assert got.run == run
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"]

    def test_results_from_other_rows_are_refused(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        store.check_provenance("glosses", {"sha256": "a"})
        store.put(Record(Run("glosses", "none", "majority"), [1.0], versions={"sha256": "a", "torch": "1"}))
        store.check_provenance("glosses", {"sha256": "a"})
        store.check_provenance("sections", {"sha256": "b"})
        with pytest.raises(ValueError, match="from other rows"):
            store.check_provenance("glosses", {"sha256": "b"})

    def test_other_settings_are_another_file(self) -> None:
        run = Run("glosses", "smollm2", "lora", 8, 100, 0.02)
        others = [
            Run("glosses", "smollm2", "lora", 8, 100, 0.02, seed=1),
            Run("glosses", "smollm2", "lora", 8, 100, 0.03),
        ]
        assert len({run.file, *(other.file for other in others)}) == 3
