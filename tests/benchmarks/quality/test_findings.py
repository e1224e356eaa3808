"""The experiments on papers' findings: their runs, and verdicts in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softhooks
from benchmarks.quality import transfer
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm
from benchmarks.quality.findings.rates import SEARCHED, TRIED, found_rate, rate_runs
from benchmarks.quality.findings.settings import RATES, SEEDS
from benchmarks.quality.inputs import DecoderInputs
from benchmarks.quality.method_pages import RESULTS
from benchmarks.quality.models import SMOLLM2
from benchmarks.quality.plan import FULL, SMALL, final_runs
from benchmarks.quality.records import Record, Store
from benchmarks.quality.setup import Setup
from benchmarks.quality.softhooks_methods import RUNNER_OPTIONS, multitask_prompt_tuning, prompt_tuning
from benchmarks.quality.task import Task
from softhooks.method import METHODS

ROWS = 120
PNG = b"\x89PNG"
BY_NAME = {finding.name: finding for finding in FINDINGS}


def _fill(store: Store, arm: Arm, share: float) -> None:
    """Write results with this share of right answers, which differ a little between seeds."""
    for run in arm.runs:
        generator = np.random.default_rng(run.seed)
        scores = (np.linspace(0, 1, ROWS) + generator.normal(0, 0.02, ROWS)) < share
        store.put(Record(run, scores.astype(float).tolist(), context_tokens=900, seconds=12.0))


def _filled(tmp_path: Path, finding: Finding, share: Callable[[int], float]) -> Store:
    store = Store(tmp_path)
    for number, one in enumerate(finding.arms):
        _fill(store, one, share(number))
    return store


@pytest.fixture
def arms() -> tuple[Arm, Arm]:
    return tuple(arm(f"length {n}", "prompt_tuning", SMOLLM2, num_virtual_tokens=n) for n in (20, 1))  # type: ignore[return-value]


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RATES, ids=str)
def test_a_rate_is_the_one_that_the_kept_results_choose(key: tuple[str, str]) -> None:
    assert found_rate(FULL, Store(RESULTS / "full"), key) in (None, RATES[key])


def test_the_best_rate_on_development_rows_is_found(tmp_path: Path) -> None:
    store, best = Store(tmp_path), TRIED[0]
    for run in rate_runs():
        assert run.part == "development"
        assert run.options
        store.put(Record(run, [float(run.learning_rate == best), 1.0]))
    assert [found_rate(FULL, store, key) for key in SEARCHED] == [best] * len(SEARCHED)
    assert found_rate(FULL, store, (SMOLLM2, "prompt_tuning")) is None


# --- runs -------------------------------------------------------------------------------------------------------------


def test_findings_are_cheap() -> None:
    assert len(BY_NAME) == len(FINDINGS)
    for finding in FINDINGS:
        assert len(finding.arms) <= 8
        assert all(len(one.runs) == len(SEEDS) == 3 for one in finding.arms)
        assert len({run.file for run in finding.runs}) == len(finding.runs)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_options_survive_a_result_file(finding: Finding, tmp_path: Path) -> None:
    for run in finding.runs:
        Store(tmp_path).put(Record(run, [1.0]))
        found = Store(tmp_path).get(run)
        assert found is not None
        assert json.dumps(found.run.options) == json.dumps(run.options)


OWN_OPTIONS = {
    "p_tuning": {"start", "before_question"},
    "llama_adapter": {"gates"},
    "cartridge": {"in_context"},
}
"""The options that are for the runner instead of the method; the findings' modules describe them."""


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_options_are_those_of_the_methods(finding: Finding) -> None:
    kinds = dict.fromkeys(("cpt", "peft_cpt"), softhooks.ContextAwarePromptTuning.kind)
    for run in finding.runs:
        method = METHODS[kinds.get(run.contestant, run.contestant)]
        unknown = {name for name, _ in run.options} - set(method.__dataclass_fields__) - RUNNER_OPTIONS
        assert unknown <= OWN_OPTIONS.get(run.contestant, set())


def test_lengths_and_layers_are_accepted_by_the_methods() -> None:
    for run in BY_NAME["prompt_length"].runs:
        softhooks.PromptTuning(**dict(run.options))
    for run in BY_NAME["deep_layers"].runs:
        assert len(list(softhooks.PTuningV2(**dict(run.options)).layers or ())) == 3
    for run in (run for run in BY_NAME["prefix_mlp"].runs if run.options):
        softhooks.PrefixTuning(**dict(run.options))


@pytest.mark.parametrize("prepare", [prompt_tuning, multitask_prompt_tuning])
def test_source_prompts_start_from_words_of_the_vocabulary(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class MadeError(Exception):
        """Ends the preparation when the method is made."""

    made: list[Any] = []

    def source_prompt(setup: Setup, method: Callable[[list[str]], Any]) -> str:
        made.append(method(["sections", "docstrings"]))
        raise MadeError

    monkeypatch.setattr(transfer, "source_prompt", source_prompt)
    task = Task("glosses", "Name the kind.", "\nKind:", ("a", "b"), (), (), (), 48)
    run = next(run for run in BY_NAME["transfer_parts"].runs if run.contestant == prepare.__name__)
    none: Any = None
    with pytest.raises(MadeError):
        prepare(none, Setup(task, DecoderInputs(task, none), [], dict(run.options)))
    assert made[0].init == "vocab"
    assert made[0].init_text is None


def test_the_small_profile_has_no_findings() -> None:
    assert FULL.findings
    assert not SMALL.findings


def test_settings_without_options_are_runs_of_the_main_comparison() -> None:
    """They have its steps and learning rates, so that its results are used."""
    shared = {run.file for finding in FINDINGS for run in finding.runs if not run.options}
    compared = {run.file for run in final_runs(FULL, Store(RESULTS / "full"))}
    assert shared
    assert shared <= compared


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_clear_difference_holds(arms: tuple[Arm, Arm], tmp_path: Path) -> None:
    _fill(Store(tmp_path), arms[0], 0.8)
    _fill(Store(tmp_path), arms[1], 0.6)
    verdict = all_hold(Expect(*arms))(Store(tmp_path))
    assert verdict.judgment == "held"
    assert verdict.sentence.startswith("Length 20 (0.8")
    assert "against length 1 (0.597 ± 0.003)" in verdict.sentence
    assert ": better (+0.2" in verdict.sentence


def test_the_opposite_is_a_contradiction(arms: tuple[Arm, Arm], tmp_path: Path) -> None:
    _fill(Store(tmp_path), arms[0], 0.6)
    _fill(Store(tmp_path), arms[1], 0.8)
    verdict = all_hold(Expect(*arms))(Store(tmp_path))
    assert verdict.judgment == "contradicted"
    assert ": worse (-0.2" in verdict.sentence
    assert all_hold(Expect(*arms, "not worse"))(Store(tmp_path)).judgment == "contradicted"


def test_equal_results_hold_only_if_no_difference_is_expected(arms: tuple[Arm, Arm], tmp_path: Path) -> None:
    for one in arms:
        _fill(Store(tmp_path), one, 0.7)
    verdict = all_hold(Expect(*arms))(Store(tmp_path))
    assert verdict.judgment == "not confirmed"
    assert ": no clear difference (+0.000" in verdict.sentence
    assert all_hold(Expect(*arms, "not worse"))(Store(tmp_path)).judgment == "held"


def test_the_worst_comparison_decides(arms: tuple[Arm, Arm], tmp_path: Path) -> None:
    store = Store(tmp_path)
    equal = arm("length 5", "prompt_tuning", SMOLLM2, num_virtual_tokens=5)
    for one, share in ((arms[0], 0.8), (arms[1], 0.6), (equal, 0.8)):
        _fill(store, one, share)
    held, undecided, opposite = Expect(*arms), Expect(arms[0], equal), Expect(*reversed(arms))
    assert all_hold(held, undecided)(store).judgment == "not confirmed"
    assert all_hold(held, undecided, opposite)(store).judgment == "contradicted"


def test_a_missing_seed_gives_no_verdict(arms: tuple[Arm, Arm], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for one in arms:
        _fill(store, one, 0.7)
    (tmp_path / arms[1].runs[-1].file).unlink()
    verdict = all_hold(Expect(*arms), Expect(*arms, "not worse"))(store)
    assert verdict.judgment == "not measured"
    assert verdict.sentence == "Results are missing for length 1."


# The settings that each finding expects to be good. Without them on top the finding must not hold.
GOOD = {
    "prompt_length": {"20 virtual tokens", "100 virtual tokens"},
    "prompt_init": {"initialized from the instruction", "initialized from class labels"},
    "prefix_mlp": {"instruction, with MLP", "random, with MLP"},
    "prefix_init": {"instruction, with MLP", "instruction, without MLP"},
    "prefix_layers": {"instruction, with MLP", "instruction, without MLP"},
    "anchors": {"half in front, half before the question"},
    "deep": {"all six layers"},
    "deep_layers": {"upper three layers"},
    "transfer": {"MPT with teachers"},
    "cpt": {"CPT"},
    "cpt_parts": {"CPT"},
    "zero_gate": {"gates from 0"},
    "cartridge": {"cartridge of 128 tokens", "document in the context"},
    "schedule": {"a linear schedule"},
    "precision": {"parameters in float32"},
    "chat_start": {"the instruction in the chat template"},
    "dropout": {"prompt tuning, without dropout", "P-tuning v2, without dropout"},
}


@pytest.mark.parametrize("name", GOOD)
def test_verdicts_in_both_directions(name: str, tmp_path: Path) -> None:
    finding = BY_NAME[name]
    labels = [one.label for one in finding.arms]
    assert GOOD[name] < set(labels)
    as_claimed = _filled(tmp_path / "held", finding, lambda n: 0.8 if labels[n] in GOOD[name] else 0.5)
    reversed_ = _filled(tmp_path / "reversed", finding, lambda n: 0.5 if labels[n] in GOOD[name] else 0.8)
    assert finding.judge(as_claimed).judgment == "held"
    assert finding.judge(reversed_).judgment == "contradicted"
    assert finding.judge(Store(tmp_path / "empty")).judgment == "not measured"


def test_transfer_needs_both_parts(tmp_path: Path) -> None:
    """Its three settings must be in order."""
    finding = BY_NAME["transfer_parts"]
    assert finding.judge(_filled(tmp_path / "a", finding, lambda n: 0.5 + 0.15 * n)).judgment == "held"
    assert finding.judge(_filled(tmp_path / "b", finding, lambda n: (0.5, 0.5, 0.8)[n])).judgment == "not confirmed"
    assert finding.judge(_filled(tmp_path / "c", finding, lambda n: (0.5, 0.8, 0.8)[n])).judgment == "not confirmed"


def test_every_finding_is_tested_in_both_directions() -> None:
    assert {*GOOD, "transfer_parts"} == set(BY_NAME)


def test_the_cartridge_is_judged_with_tokens_and_seconds(tmp_path: Path) -> None:
    finding = BY_NAME["cartridge"]
    store = _filled(tmp_path, finding, lambda n: 0.7)
    sentence = finding.judge(store).sentence
    assert "The document has 900 tokens, the cartridge 128." in sentence
    assert "Training took 12 s." in sentence
    assert "Answering" not in sentence
    for record in store.all():
        store.put(Record(record.run, record.scores, seconds=3.0, extra={"scoring_seconds": 4.5}))
    assert "took 4.5 s with the document and 4.5 s with the cartridge" in finding.judge(store).sentence


# --- plots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt_length", "cpt_parts"])
def test_plots_are_written_if_there_are_results(name: str, tmp_path: Path) -> None:
    finding = BY_NAME[name]
    path = tmp_path / "plot.png"
    assert finding.plot(Store(tmp_path / "empty"), path) is False
    assert not path.exists()
    store = Store(tmp_path / "one")
    _fill(store, finding.arms[1], 0.6)
    assert finding.plot(store, path) is True
    first = path.read_bytes()
    assert first.startswith(PNG)
    assert finding.plot(_filled(tmp_path / "all", finding, lambda n: 0.5 + 0.1 * n), path) is True
    assert path.read_bytes() != first
