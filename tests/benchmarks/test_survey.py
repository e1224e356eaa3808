"""The survey's results: kept while it runs, written sorted, and counted in the report; a model that hangs costs only its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.survey import __main__ as command
from benchmarks.survey.apart import examine_apart
from benchmarks.survey.case import Case, Row
from benchmarks.survey.modalities import TASKS
from benchmarks.survey.report import write_report
from benchmarks.survey.store import Store, read_tasks, write_task

RIGHT = Row(injection="slots", checked=["effect"]).as_json()
REFUSED = Row(refusal="GPT2LMHeadModel takes none.").as_json()
WRONG = Row(
    injection="attention", wrong={"effect": "the prompt does not move the output"}, checked=["effect"]
).as_json()


def test_a_row_is_wrong_before_it_is_refused() -> None:
    assert [row["verdict"] for row in (RIGHT, REFUSED, WRONG)] == ["right", "refused", "wrong"]
    assert Row(refusal="no", wrong={"removal": "a hook stays"}).verdict == "wrong"


def test_results_are_kept_by_kind_and_what_did_not_finish_is_tried_again(tmp_path: Path) -> None:
    store, case = Store(tmp_path), Case("causal", "gpt2")
    assert store.get(case) is None
    store.put(case, {"not finished": "no answer within 1 s"})
    assert store.get(case) is None
    assert store.latest(case) == {"not finished": "no answer within 1 s"}
    store.put(case, {"prompt": RIGHT})
    store.put(case, {"prefix": REFUSED})
    assert store.get(case) == {"prompt": RIGHT, "prefix": REFUSED}


def test_result_files_are_sorted_and_read_back(tmp_path: Path) -> None:
    found: dict[str, dict[str, Any]] = {"gpt2": {"prompt": RIGHT, "seconds": 2.0}, "bert": {"not built": "no config"}}
    path = write_task(TASKS["causal"], found, tmp_path)
    results, versions = read_tasks([TASKS["causal"], TASKS["qa"]], tmp_path)
    assert list(results["causal"]) == ["bert", "gpt2"]
    assert results == {"causal": {"bert": {"not built": "no config"}, "gpt2": {"prompt": RIGHT}}}
    assert "transformers" in versions
    assert write_task(TASKS["causal"], dict(reversed(found.items())), tmp_path).read_text() == path.read_text()


def test_the_report_counts_and_lists(tmp_path: Path) -> None:
    models = {
        "gpt2": {"prompt": RIGHT, "prefix": WRONG, "adapter": REFUSED},
        "bert": {"not built": "no tiny model: KeyError"},
        "llama": {"prompt": RIGHT, "prefix": RIGHT},
    }
    page = write_report({"causal": models}, {"torch": "2.13"}, tmp_path / "README.md").read_text()
    assert "| causal LM | 3 | 2 | 2 / 0 / 0 | 1 / 0 / 1 | 0 / 1 / 0 | 0 / 0 / 0 | 0 / 0 / 0 |" in page
    assert "| `gpt2` (causal) | prefix | effect | the prompt does not move the output |" in page
    assert "| adapter | the model takes none. | `gpt2` |" in page
    assert "| `bert` (causal) | no tiny model: KeyError |" in page
    assert "5 rows; torch 2.13. Not surveyed yet: seq2seq LM," in page


@pytest.mark.slow
def test_a_model_is_examined_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Store", lambda: Store(tmp_path / "kept"))
    call = [
        "--tasks",
        "causal",
        "--only",
        "gpt2",
        "--kinds",
        "prefix",
        "--jobs",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    first = CliRunner().invoke(command.app, [*call, "--seconds", "200"])
    assert first.exit_code == 0, first.output
    assert "1  prefix: right" in first.output
    assert examine_apart(Case("causal", "gpt2"), ["prefix"], seconds=0) == {"not finished": "no answer within 0 s"}


def test_unknown_names_are_refused() -> None:
    for option, name in (("--tasks", "causl"), ("--kinds", "prompts"), ("--profile", "small")):
        result = CliRunner().invoke(command.app, [option, name])
        assert result.exit_code == 2
        assert name in result.output
