"""The report on made-up results: its tables, missing runs, bold scores, comparisons and plots."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import plan
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.models import MINILM, SMOLLM2
from benchmarks.quality.plan import Profile
from benchmarks.quality.records import Record, Run, Store
from benchmarks.quality.report import TWO_SEEDS, write_report
from benchmarks.quality.standings import Standings, label_of
from benchmarks.quality.tables import MISSING, markdown_table, scores_table

ROWS = 200
TUNED = ("lora", "peft_prompt_tuning", "peft_prefix_tuning", "prompt_tuning", "prefix_tuning")
PROFILE = Profile(
    "made up",
    tasks={MINILM: ("docstrings",), SMOLLM2: ("docstrings",)},
    searched=("docstrings",),
    contestants={MINILM: ("head", *TUNED), SMOLLM2: (*TUNED, "p_tuning")},
    shots=(8, 32, 150),
    seeds={MINILM: 2, SMOLLM2: 3},
    steps={MINILM: lambda shots: 60, SMOLLM2: lambda shots: 100},
)
SHARES = {"majority": 0.1, "tfidf": 0.4, "zero_shot": 0.3, "few_shot": 0.45, "head": 0.55, "lora": 0.7}
"""The share of right answers of each contestant; PEFT's methods have 0.6, and softhooks' 0.7 and 0.75."""


def _share(run: Run) -> float:
    methods = {"prompt_tuning": 0.75, "prefix_tuning": 0.7, "p_tuning": 0.7}
    score = (SHARES | methods).get(run.contestant, 0.6)
    if run.contestant == "few_shot" and dict(run.options)["examples"] is None:
        return score + 0.05
    searched = run.learning_rate and run.part == "development"
    return score - 0.1 * abs(np.log10(run.learning_rate / 0.01)) if searched else score


def _record(run: Run) -> Record:
    generator = np.random.default_rng(run.seed + run.shots)
    scores = (np.linspace(0, 1, ROWS) + generator.normal(0, 0.02, ROWS)) < _share(run)
    return Record(
        run,
        scores.astype(float).tolist(),
        trained=7680 if run.steps else 0,
        saved_bytes=30720 if run.steps else 0,
        context_tokens=100 * run.shots if run.contestant == "few_shot" else 0,
        seconds=run.shots + 0.25,
        versions={"torch": "9.9", "processor": "Z80"},
        extra={"batch_size": 8, "rows": {"train": 4000, "development": 150, "test": ROWS}} if run.steps else {},
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """All results of the profile."""
    store = Store(tmp_path / "results")
    for run in [*plan.baseline_runs(PROFILE), *plan.prompt_runs(PROFILE)]:
        store.put(_record(run))
    while remaining := store.missing(plan.search_runs(PROFILE, store)):
        for run in remaining:
            store.put(_record(run))
    for run in [*plan.prompted_runs(PROFILE, store), *plan.final_runs(PROFILE, store)]:
        store.put(_record(run))
    return store


def _rows(store: Store, model: str) -> dict[str, dict[str, str]]:
    """Return the cells of a table by contestant and column."""
    lines = [
        line.strip("|").split("|") for line in scores_table(Standings(store, PROFILE), "docstrings", model).split("\n")
    ]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def _report(store: Store, tmp_path: Path) -> str:
    return write_report(store, PROFILE, tmp_path / "report").read_text(encoding="utf-8")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_has_every_contestant_and_every_number_of_shots(store: Store) -> None:
    encoder, decoder = _rows(store, MINILM), _rows(store, SMOLLM2)
    baselines = {label_of("majority"), label_of("tfidf")}
    assert set(encoder) == {label_of(name) for name in ("majority", "tfidf", "head", *TUNED)}
    assert set(decoder) - baselines == {label_of(name) for name in ("zero_shot", "few_shot", "p_tuning", *TUNED)}
    assert list(encoder["head only"])[1:4] == ["8 shots", "32 shots", "150 shots"]
    assert "0 shots" in decoder["zero-shot"]


def test_cells_are_the_mean_and_standard_error_of_the_results(store: Store) -> None:
    scores = [record.score for record in store.all() if _is(record.run, "head", 32) and record.run.part == "test"]
    assert len(scores) == 2
    expected = f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1) / np.sqrt(2):.3f}"
    row = _rows(store, MINILM)["head only"]
    assert row["32 shots"] == expected
    assert row["seeds"] == "2"
    assert row["trained"] == "7,680"
    assert row["saved bytes"] == "30,720"
    assert row["seconds"] == "8.2 / 32.2 / 150.2"
    assert row["learning rate"] == "0.01"


def test_the_costs_of_contexts_and_baselines(store: Store) -> None:
    rows = _rows(store, SMOLLM2)
    few_shot = rows[label_of("few_shot")]
    assert few_shot["context"] == "800 / 3,200 / 15,000"
    assert rows[label_of("lora")]["context"] == ""
    for label in (label_of("few_shot"), label_of("tfidf"), label_of("majority"), label_of("zero_shot")):
        assert rows[label]["trained"] == rows[label]["saved bytes"] == ""
        assert rows[label]["seconds"]


def _is(run: Run, contestant: str, shots: int, model: str = MINILM) -> bool:
    return (run.contestant, run.shots, run.model) == (contestant, shots, model)


def test_only_the_best_score_of_a_column_is_bold(store: Store) -> None:
    rows = _rows(store, MINILM)
    for column in ("8 shots", "32 shots", "150 shots"):
        assert [label for label, row in rows.items() if "**" in row[column]] == [label_of("prompt_tuning")]


def test_equal_scores_are_both_bold_and_a_single_score_is_not(store: Store) -> None:
    for record in store.all():
        if _is(record.run, "prompt_tuning", 8) and record.run.part == "test":
            twin = next(
                r
                for r in store.all()
                if _is(r.run, "lora", 8) and r.run.seed == record.run.seed and r.run.part == "test"
            )
            store.put(Record(twin.run, record.scores))
    rows = _rows(store, MINILM)
    assert [label for label, row in rows.items() if "**" in row["8 shots"]] == [
        label_of("lora"),
        label_of("prompt_tuning"),
    ]
    assert "**" not in _rows(store, SMOLLM2)["zero-shot"]["0 shots"]


def test_cells_without_planned_runs_are_empty(store: Store) -> None:
    rows = _rows(store, SMOLLM2)
    assert rows["zero-shot"]["8 shots"] == ""
    assert rows[label_of("p_tuning")]["0 shots"] == ""
    assert rows[label_of("p_tuning")]["8 shots"] == ""
    assert rows[label_of("p_tuning")]["32 shots"].startswith("0.69")


def test_missing_runs_are_dashes(store: Store) -> None:
    for path in _paths(store, "lora", 32):
        path.unlink()
    row = _rows(store, MINILM)[label_of("lora")]
    assert row["32 shots"] == MISSING
    assert row["8 shots"].startswith("0.7")


def test_a_contestant_without_any_results_has_dashes_only(store: Store) -> None:
    for shots in PROFILE.shots:
        for path in _paths(store, "head", shots):
            path.unlink()
    assert set(list(_rows(store, MINILM)["head only"].values())[1:]) == {MISSING}


def test_a_learning_rate_that_is_not_chosen_leaves_dashes(store: Store) -> None:
    """A test result with a rate from an unfinished search is not shown."""
    searched = next(run for run in plan.search_runs(PROFILE, store) if run.contestant == "head")
    (store.directory / searched.file).unlink()
    assert set(list(_rows(store, MINILM)["head only"].values())[1:]) == {MISSING}


def test_missing_seeds_are_counted(store: Store) -> None:
    _paths(store, "head", 32)[0].unlink()
    assert _rows(store, MINILM)["head only"]["seeds"] == "2 / 1 of 2 / 2"


def test_experiments_on_findings_are_not_in_the_tables(store: Store) -> None:
    before = _rows(store, MINILM)
    run = next(r.run for r in store.all() if _is(r.run, "prompt_tuning", 32) and r.run.part == "test")
    changed = Run(**{**vars(run), "options": (("num_virtual_tokens", 1),)})
    store.put(Record(changed, [0.0] * ROWS))
    assert _rows(store, MINILM) == before


def _paths(store: Store, contestant: str, shots: int) -> list[Path]:
    runs = [r.run for r in store.all() if _is(r.run, contestant, shots) and r.run.part == "test"]
    assert len(runs) == 2
    return [store.directory / run.file for run in runs]


def test_tables_are_markdown() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_the_best_method_is_chosen_on_the_development_rows(store: Store) -> None:
    """Prefix tuning is given the best test results, which must not matter."""
    for record in store.all():
        if record.run.contestant == "prefix_tuning" and record.run.part == "test":
            store.put(Record(record.run, [1.0] * ROWS))
    assert Standings(store, PROFILE).best_method("docstrings", MINILM, 32) == ("prompt_tuning", "development")


def test_comparisons_say_better_worse_and_on_a_par(store: Store, tmp_path: Path) -> None:
    text = _report(store, tmp_path)
    section = text.split("## Comparisons")[1].split("## Findings")[0]
    best = "prompt tuning (softhooks), the best softhooks method on the development rows"
    assert f"32 shots: {best}, against LoRA, r = 8 (PEFT): better (+" in section
    assert re.search(r"Better on the test rows: prompt tuning \(softhooks\), 0\.7\d\d ± 0\.\d{3}\.", section)
    assert re.search(r"On a par on the test rows: prefix tuning \(softhooks\), 0\.", section)
    peft = [
        line for line in section.split("\n") if line.startswith("| prefix tuning (softhooks) | prefix tuning (PEFT)")
    ]
    assert len(peft) == 2 * len(PROFILE.shots)
    assert all("| better |" in line for line in peft)
    for record in store.all():
        if record.run.contestant in ("lora", "prefix_tuning") and record.run.part == "test":
            store.put(Record(record.run, [float(record.run.contestant == "lora")] * ROWS))
        elif record.run.contestant == "prompt_tuning" and record.run.part == "test":
            store.put(_record(Run(**{**vars(record.run), "contestant": "peft_prompt_tuning"})))
            store.put(
                Record(record.run, _record(Run(**{**vars(record.run), "contestant": "peft_prompt_tuning"})).scores)
            )
    section = _report(store, tmp_path).split("## Comparisons")[1].split("## Findings")[0]
    assert "against LoRA, r = 8 (PEFT): worse (" in section
    assert "All methods of softhooks are worse on the test rows." in section
    assert re.search(
        r"\| prompt tuning \(softhooks\) \| prompt tuning \(PEFT\) \| on a par within one standard error", section
    )
    assert re.search(r"\| prefix tuning \(softhooks\) \| prefix tuning \(PEFT\) \| worse", section)


def test_missing_lora_is_said(store: Store, tmp_path: Path) -> None:
    for path in _paths(store, "lora", 8):
        path.unlink()
    assert f"- 8 shots: {MISSING} (there are no results of LoRA" in _report(store, tmp_path)


# --- what is behind ---------------------------------------------------------------------------------------------------


def _gaps(store: Store, tmp_path: Path) -> str:
    return _report(store, tmp_path).split("## Where softhooks is behind")[1].split("## Findings")[0]


def test_nothing_is_behind_if_all_scores_are_higher(store: Store, tmp_path: Path) -> None:
    assert "No cell of the tables above has such a difference." in _gaps(store, tmp_path)


def test_what_is_behind_lora_and_peft_is_listed_with_what_the_results_say(store: Store, tmp_path: Path) -> None:
    """With 32 shots all methods are below LoRA, and prompt tuning is below PEFT's; elsewhere nothing is."""
    for record in store.all():
        run = record.run
        if run.part == "test" and run.shots == 32 and run.model == SMOLLM2:
            if run.contestant == "p_tuning":
                store.put(replace(record, trained=20_000))
            share = {"lora": 0.95, "peft_prompt_tuning": 0.9}.get(run.contestant)
            if share is not None:
                scores = np.linspace(0, 1, ROWS) + np.random.default_rng(run.seed).normal(0, 0.02, ROWS) < share
                store.put(replace(record, scores=scores.astype(float).tolist(), trained=1_000_000))
    items = [line for line in _gaps(store, tmp_path).split("\n") if line.startswith("- ")]
    lora, peft = items
    assert re.match(
        r"- docstrings, smollm2, 32 shots: prompt tuning \(softhooks\), the best of softhooks' methods, 0\.7", lora
    )
    assert "It trains 7,680 parameters, LoRA 1,000,000." in lora
    assert "Rank correlation" in lora
    assert re.match(
        r"- docstrings, smollm2, 32 shots: prompt tuning \(softhooks\), 0\.7\d\d ± .* against PEFT's, 0\.9", peft
    )
    assert "Both have the learning rate 0.01." in peft


def test_what_was_tried_has_every_rate_and_marks_the_chosen_one(store: Store, tmp_path: Path) -> None:
    tables = _gaps(store, tmp_path).split("### ")[1:]
    assert [table.split(":")[0] for table in tables] == [MINILM, SMOLLM2]
    rows = [line for line in tables[1].split("\n") if line.startswith("| ") and "---" not in line]
    header, *contestants = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    assert len(contestants) == len(PROFILE.contestants[SMOLLM2] or ())
    for name, *scores in contestants:
        found = {rate: score for rate, score in zip(header[1:], scores, strict=True) if score}
        assert len(found) >= 3, name
        best = [rate for rate, score in found.items() if score.startswith("**")]
        values = {rate: float(score.strip("*")) for rate, score in found.items()}
        assert len(best) == 1
        assert values[best[0]] == max(values.values())


# --- the whole report -------------------------------------------------------------------------------------------------


def test_the_report_has_its_sections_and_plots(store: Store, tmp_path: Path) -> None:
    text = _report(store, tmp_path)
    assert [line for line in text.split("\n") if line.startswith("## ")] == [
        "## How it was measured",
        "## Scores",
        "## Comparisons",
        "## Where softhooks is behind, and what was tried",
        "## Findings of papers",
    ]
    assert "- torch: 9.9" in text
    assert "- processor: Z80" in text
    assert "- optimizer steps: 60, 100" in text
    assert "- batch size: 8" in text
    assert "- seeds: 0, 1, 2" in text
    assert "- runs of the comparison without a result: 0" in text
    assert "### docstrings, minilm: accuracy" in text
    assert "Learning rates were chosen on the development rows of docstrings, one for each model and contestant" in text
    assert "- docstrings, smollm2, few-shot in context: `# {text}\\nimport {answer}`" in text
    assert "was chosen and is used for all numbers of shots; ties went to the smallest rate" in text
    assert "for synopses: 8 rows each" in text
    assert "fits into 1,024 tokens." in text
    assert "- minilm: all-MiniLM-L6-v2" in text
    assert f"| docstrings | 4000 | 150 | {ROWS} |" in text
    encoder, decoder = text.split("### docstrings, smollm2: accuracy")
    assert TWO_SEEDS in encoder
    assert TWO_SEEDS not in decoder
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(images) == 4
    for image in images:
        assert (tmp_path / "report" / image).read_bytes().startswith(b"\x89PNG")


def test_a_single_number_of_shots_has_one_plot(store: Store, tmp_path: Path) -> None:
    path = write_report(store, replace(PROFILE, shots=(32,)), tmp_path / "report", [])
    text = path.read_text(encoding="utf-8")
    assert "against shots" not in text
    assert "docstrings-minilm-trained.png" in text
    assert not list(path.parent.glob("*-shots.png"))
    assert "with 32 shots and one seed. Each" in text
    assert "was chosen; ties went" in text
    assert "## Findings" not in text


def test_unknown_numbers_of_rows_are_dashes(store: Store, tmp_path: Path) -> None:
    for record in store.all():
        store.put(replace(record, extra={}))
    assert f"| docstrings | {MISSING} | {MISSING} | {MISSING} |" in _report(store, tmp_path)


def test_rouge_is_called_rouge(store: Store, tmp_path: Path) -> None:
    record = next(r for r in store.all() if _is(r.run, "head", 32) and r.run.part == "test")
    store.put(Record(record.run, [0.5] * ROWS))
    assert "### docstrings, minilm: ROUGE-L" in _report(store, tmp_path)


def test_findings_are_not_measured_without_runs(store: Store, tmp_path: Path) -> None:
    text = _report(store, tmp_path)
    assert text.count("**Not measured.**") == len(FINDINGS)
    assert "finding-" not in text


def test_findings_are_shown_with_plot_and_verdict(store: Store, tmp_path: Path) -> None:
    finding = next(finding for finding in FINDINGS if finding.name == "zero_gate")
    for arm, right in zip(finding.arms, (0.8, 0.5, 0.5), strict=True):
        for run in arm.runs:
            count = round(ROWS * right) + run.seed
            store.put(Record(run, [1.0] * count + [0.0] * (ROWS - count)))
    text = _report(store, tmp_path)
    section = text.split(f"### {finding.claim}")[1].split("###")[0]
    assert "**Held.** Gates from 0 (0.805 ± 0.003) against gates from 1 (0.505 ± 0.003): better (+0.300" in section
    assert "| gates from N(0, 1) | 0.505 ± 0.003 |" in section
    assert "![zero_gate](finding-zero_gate.png)" in section
    assert (tmp_path / "report" / "finding-zero_gate.png").stat().st_size > 5000


def test_no_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        write_report(Store(tmp_path), PROFILE, tmp_path / "report")
