"""The results in the methods' pages are those of the result files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import plan
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.method_pages import MARKER, PAGES, RESULTS, SUBJECTS, measured, with_measured
from benchmarks.quality.models import MINILM, SMOLLM2
from benchmarks.quality.plan import FULL, Profile
from benchmarks.quality.records import Record, Run, Store
from benchmarks.quality.standings import Standings

PROFILE = Profile(
    "made up",
    tasks={SMOLLM2: ("docstrings",), MINILM: ("docstrings",)},
    searched=("docstrings",),
    contestants={SMOLLM2: ("lora", "prefix_tuning", "peft_prefix_tuning"), MINILM: ("lora",)},
    shots=(8, 32),
    seeds={SMOLLM2: 2, MINILM: 2},
    steps={SMOLLM2: lambda shots: 100, MINILM: lambda shots: 60},
)
SHARES = {"zero_shot": 0.3, "few_shot": 0.25, "lora": 0.7, "prefix_tuning": 0.75, "peft_prefix_tuning": 0.5}


def _write(store: Store, run: Run) -> None:
    share = SHARES.get(run.contestant, 0.1) - 0.1 * (run.learning_rate not in (0.0, 0.003))
    store.put(Record(run, [float(row < 20 * share) for row in range(20)]))


@pytest.fixture
def results(tmp_path: Path) -> Standings:
    return _filled(Store(tmp_path), PROFILE)


def _filled(store: Store, profile: Profile) -> Standings:
    """Write all results of a profile."""
    for runs in (plan.baseline_runs(profile), plan.prompt_runs(profile)):
        for run in runs:
            _write(store, run)
    while missing := store.missing(plan.search_runs(profile, store)):
        for run in missing:
            _write(store, run)
    for run in (*plan.prompted_runs(profile, store), *plan.final_runs(profile, store)):
        _write(store, run)
    return Standings(store, profile)


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_shows_the_results_that_are_kept(path: Path) -> None:
    """After new results: `python -m benchmarks.quality.method_pages`."""
    page = path.read_text(encoding="utf-8")
    assert with_measured(page, Standings(Store(RESULTS / "full"), FULL)) == page


def test_every_subject_exists() -> None:
    names = {found[0] for path in PAGES.glob("*.md") if (found := MARKER.search(path.read_text(encoding="utf-8")))}
    assert names == set(SUBJECTS)
    contestants = {name for subject in SUBJECTS.values() for name in (subject.contestant, *subject.others)}
    assert contestants - {None} <= set(CONTESTANTS)
    shown = [name for subject in SUBJECTS.values() for name in subject.findings]
    assert sorted(shown) == sorted(finding.name for finding in FINDINGS)


def test_a_section_compares_a_method_with_peft_lora_and_words(results: Standings) -> None:
    lines = measured(results, "prefix_tuning", ()).splitlines()
    header, _, scores, rates = (line for line in lines if line.startswith("|"))
    assert header == (
        "| task, model | prefix tuning (softhooks) | prefix tuning (PEFT) | LoRA, r = 8 (PEFT) "
        "| zero-shot or few-shot, the better |"
    )
    assert scores.startswith("| docstrings, SmolLM2 | 0.750 ± 0.000 | 0.500 ± 0.000 | 0.700 ± 0.000 | 0.300 ±")
    assert rates == "| learning rate, SmolLM2 | 0.003 | 0.003 | 0.003 |  |"


def _finding(name: str, judgment: str) -> Any:
    verdict = SimpleNamespace(judgment=judgment, sentence="0.7 against 0.5.")
    return SimpleNamespace(name=name, claim=f"About {name}.", judge=lambda store: verdict)


def test_a_section_says_what_the_experiments_on_the_method_found(results: Standings) -> None:
    found = [_finding("prefix_init", "confirmed"), _finding("prefix_mlp", "not measured")]
    section = measured(results, "prefix_tuning", [*found, _finding("anchors", "confirmed")])
    assert "- About prefix_init. **Confirmed.** 0.7 against 0.5.\n" in section
    assert "prefix_mlp" not in section
    assert "anchors" not in section


def test_a_task_is_shown_if_only_another_variant_of_the_method_has_results(tmp_path: Path) -> None:
    profile = replace(
        PROFILE,
        tasks={SMOLLM2: ("docstrings", "synopses")},
        contestants={SMOLLM2: ("lora", "llama_adapter", "llama_adapter_v2")},
    )
    text = measured(_filled(Store(tmp_path), profile), "llama_adapter", ())
    assert "Accuracy (for synopses, ROUGE-L)" in text
    assert re.search(r"\| synopses, SmolLM2 \|  \| 0\.\d{3} ± ", text)


def test_without_results_a_page_ends_with_its_comment(tmp_path: Path, results: Standings) -> None:
    page = "# Prefix tuning\n\n<!-- measured: prefix_tuning -->\n"
    empty = Standings(Store(tmp_path / "empty"), PROFILE)
    assert with_measured(page, empty) == page
    filled = with_measured(page, results, ())
    assert filled.startswith(f"{page}\n## Measured\n")
    assert with_measured(filled, results, ()) == filled
    assert with_measured(filled, empty) == page


def test_a_page_without_its_comment(results: Standings) -> None:
    with pytest.raises(ValueError, match="no comment `<!-- measured"):
        with_measured("# Prefix tuning\n", results)
