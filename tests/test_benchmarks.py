"""The benchmarks run on a tiny model, are exact there, and report missed targets. Speed is not tested."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
pytest.importorskip("peft")
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import clock, report  # noqa: E402
from benchmarks.profiles import SMOKE  # noqa: E402
from benchmarks.result import Column, Result, Target  # noqa: E402

ROWS = {
    "exactness": 14, "training_step": 9, "memory": 8, "generation": 2, "frozen": 2, "zero_gate": 4, "few_shot": 5,
    "transfer": 4, "distillation": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Every benchmark, once."""
    found = command.measure(SMOKE, list(command.BENCHMARKS), Console(quiet=True))
    return {result.name: result for result in found}


def test_every_benchmark_has_its_rows(results: dict[str, Result]) -> None:
    assert {name: len(result.rows) for name, result in results.items()} == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_every_cell_that_needs_no_bound_is_filled(results: dict[str, Result], name: str) -> None:
    result = results[name]
    bounds = {"at least", "at most", "a flipped bit is", "right on sources"}
    for cells in result.table:
        empty = {column.header for column, cell in zip(result.columns, cells, strict=True) if not cell}
        assert empty <= bounds


def test_losses_and_gradients_equal_the_oracle_and_peft(results: dict[str, Result]) -> None:
    exactness = results["exactness"]
    assert len(exactness.targets) == 4 * len(exactness.rows)
    assert not report.missed([exactness])
    assert {row["precision"] for row in exactness.rows} == {"float32", "float64"}


def test_the_timed_models_are_exact_too(results: dict[str, Result]) -> None:
    for row in results["training_step"].rows:
        assert row["oracle_loss"] < 1e-6
        assert row["oracle_gradient"] < 1e-4
        assert min(row["bare_ms"], row["softhooks_ms"], row["peft_ms"], row["speedup"]) > 0


def test_peaks_are_counted(results: dict[str, Result]) -> None:
    for row in results["memory"].rows:
        assert row["bare_mb"] > 0
        assert 1 < row["softhooks_with_weights"] < row["softhooks_to_bare"]
    prompt = results["memory"].rows[0]
    assert prompt["softhooks_mb"] < prompt["peft_mb"]


def test_a_peak_is_the_sum_of_what_is_held_at_once() -> None:
    from benchmarks.contestants import Contestant
    from benchmarks.memory import peak

    class Holder(Contestant):
        def step(self, batch: Any) -> None:
            first, second = torch.empty(1000), torch.empty(500)
            del first, second
            third = torch.empty(1200)
            del third

    assert peak(Holder("holder", torch.nn.Identity()), {}) == 4 * 1500


def test_prompts_are_computed_once_and_say_what_the_hard_prompt_says(results: dict[str, Result]) -> None:
    assert not report.missed([results["generation"]])
    for row in results["generation"].rows:
        assert row["computed"] == row["calls"]
        assert row["recomputed"] == 2


def test_adapters_start_where_the_frozen_model_is_only_with_closed_gates(results: dict[str, Result]) -> None:
    rows = {(row["init_std"], row["gates"]): row for row in results["zero_gate"].rows}
    closed = {row["first_loss"] for (_, gates), row in rows.items() if gates == "0"}
    assert len(closed) == 1
    assert all(row["first_loss"] not in closed for (_, gates), row in rows.items() if gates != "0")
    assert all(0 <= row["worst"] <= row["accuracy"] <= row["best"] <= 1 for row in rows.values())
    assert [target.bound for target in results["zero_gate"].targets] == [0.3]


def test_contexts_start_as_in_context_learning_and_are_bounded_only_with_projection(results: dict[str, Result]) -> None:
    rows = {row["variant"]: row for row in results["few_shot"].rows}
    assert len({row["untrained"] for row in rows.values()}) == 1
    assert all(0 <= row["worst"] <= row["accuracy"] <= row["best"] <= 1 for row in rows.values())
    assert len({row["loss"] for row in rows.values()}) == len(rows)
    assert [target.bound for target in results["few_shot"].targets] == [0.2, 0.2]


def test_targets_are_compared_with_a_prompt_from_scratch_and_with_one_of_all_sources(
    results: dict[str, Result],
) -> None:
    rows = results["transfer"].rows
    assert [row["prompt"] for row in rows] == [
        "prompt from scratch", "one prompt of all sources", "MPT", "MPT with teachers",
    ]  # fmt: skip
    assert all(0 <= row["worst"] <= row["right"] <= row["best"] <= 1 for row in rows)
    assert [row["prompt"] for row in rows if "sources" in row] == [row["prompt"] for row in rows[1:]]
    taught, decomposed, sources = results["transfer"].targets
    assert taught.value == rows[3]["right"] - rows[0]["right"]
    assert decomposed.value == rows[2]["right"] - rows[1]["right"]
    assert sources.value == rows[2]["sources"] - rows[1]["sources"]


def test_a_flipped_bit_is_noticed(results: dict[str, Result]) -> None:
    assert not report.missed([results["frozen"]])


def test_results_are_written_with_all_that_judges_them(results: dict[str, Result], tmp_path: Path) -> None:
    command.write(list(results.values()), tmp_path, SMOKE)
    for name, result in results.items():
        text = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
        written = json.loads(text)
        assert len(written["rows"]) == len(result.rows)
        assert written["seed"] == SMOKE.seed
        assert written["profile"] == "smoke"
        assert {"softhooks", "torch", "transformers", "peft", "python"} == set(written["versions"])
        assert written["machine"]["threads"] == 1
        assert written["machine"]["processor"]
        assert str(ROOT) not in text
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == len(results)


def test_a_part_of_the_benchmarks_leaves_the_page_alone(results: dict[str, Result], tmp_path: Path) -> None:
    command.write([results["frozen"]], tmp_path, SMOKE)
    assert [path.name for path in tmp_path.iterdir()] == ["frozen.json"]


# --- figures and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "relation", "bound", "high", "holds"),
    [
        (1.9, "at least", 1.9, None, True),
        (1.89, "at least", 1.9, 2.0, False),
        (1.4, "at most", 1.4, None, True),
        (1.41, "at most", 1.4, None, False),
        (0.99, "at least", 1.0, 1.01, True),
        (0.99, "at least", 1.0, 0.995, False),
        (0.9, "at least", 1.0, 1.3, False),
    ],
)
def test_targets(value: float, relation: Any, bound: float, high: float | None, holds: bool) -> None:
    assert Target("figure", value, relation, bound, high).holds is holds


@pytest.mark.parametrize(("rounds", "outside"), [(3, 0), (6, 0), (9, 1), (15, 3), (25, 7), (40, 13)])
def test_interval_of_a_median(rounds: int, outside: int) -> None:
    """The known ranks of the sign test at 95%."""
    timing = clock.Timing(cpu=[float(i + 1) for i in range(rounds)])
    ones = clock.Timing(cpu=[1.0] * rounds)
    found = clock.ratio(timing, ones)
    assert (found.low, found.high) == (outside + 1, rounds - outside)


def test_everyone_takes_a_turn_each_round() -> None:
    seen: list[str] = []
    timings = clock.take_turns({name: lambda name=name: seen.append(name) for name in "abc"}, 4, 0, lambda: None)
    assert {len(timing.cpu) for timing in timings.values()} == {4}
    assert [sorted(seen[start : start + 3]) for start in range(0, 15, 3)] == [["a", "b", "c"]] * 5


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with one benchmark that misses its target."""
    missed = Result("slow", "Slow", "", (Column("a", "{a}"),), [{"a": 1}], [Target("speed", 0.5, "at least", 1.0)])
    kept = replace(missed, name="quick", targets=[Target("speed", 2.0, "at least", 1.0)])
    monkeypatch.setattr(
        command, "BENCHMARKS", {"slow": lambda profile, progress: missed, "quick": lambda profile, progress: kept}
    )
    application = typer.Typer()
    application.command()(command.main)
    return lambda *arguments: CliRunner().invoke(application, ["--quick", *arguments])


def test_a_missed_target_is_an_error(run: Any) -> None:
    outcome = run()
    assert outcome.exit_code == 1
    assert "missed speed: 0.5, must be at least 1" in outcome.output


def test_a_missed_target_can_be_let_pass(run: Any) -> None:
    assert run("--no-check").exit_code == 0


def test_only_what_is_asked_for_is_run(run: Any, tmp_path: Path) -> None:
    outcome = run("--only", "quick", "--output", str(tmp_path))
    assert outcome.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]


def test_an_unknown_benchmark_is_refused(run: Any) -> None:
    outcome = run("--only", "speed")
    assert outcome.exit_code == 2
    assert "choose from slow, quick" in " ".join(outcome.output.replace("│", " ").split())
