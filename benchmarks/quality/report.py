"""The report, in Markdown with plots, in which every number is read from the result files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.baselines import CONTEXT_LIMIT
from benchmarks.quality.comparisons import COMPARISONS, comparisons
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.findings.framework import Finding, score_name
from benchmarks.quality.gaps import gaps
from benchmarks.quality.models import DESCRIPTIONS, is_encoder
from benchmarks.quality.plan import (
    EXTENSIONS,
    GENERATED,
    Profile,
    at_an_end,
    chosen_prompt,
    contestants_of,
    search_shots,
)
from benchmarks.quality.plots import Point, plot_shots, plot_trained
from benchmarks.quality.records import Store
from benchmarks.quality.run import FEW_SHOT, PARTS, ZERO_SHOT
from benchmarks.quality.standings import Cell, Standings, label_of
from benchmarks.quality.statistics import CONFIDENCE, summarize
from benchmarks.quality.tables import (
    MISSING,
    markdown_table,
    scores_table,
)
from benchmarks.quality.task import ROWS_PER_SHOT, Template
from benchmarks.quality.tasks import TEMPLATES

SCORES = (
    "Mean ± standard error over seeds on the test rows; with a single seed, the standard error is over rows. Shots are training "
    f"rows of each class (for {', '.join(GENERATED)}: {ROWS_PER_SHOT} rows each). A few-shot context has "
    f"as many of these as is best on the development rows and fits into {CONTEXT_LIMIT:,} tokens. "
    f"The best score of a column is bold, {MISSING} marks missing runs, and a "
    "cell is empty if it does not apply or no runs are planned for it. Values separated by slashes are for the shots in "
    "order. Context: mean tokens before each row, apart from virtual tokens. Seconds: mean training time; for contexts, scoring "
    "time; for baselines without a model, both."
)
TWO_SEEDS = "Two seeds: treat standard errors as indicative."
RULE = (
    f"In a comparison, better means a difference of more than one standard error with a {CONFIDENCE:.0%} interval above 0. A "
    "finding held if all its comparisons came out as expected; it is contradicted if one came out clearly the other way, and not "
    "confirmed if there was no clear difference where one was expected."
)
RATES = (
    "Contestants of the comparison have their learning rates from it. For CPT and for prefixes with an MLP, rates were chosen on "
    "the development rows, from three. Cartridges have the rate of their paper, and multitask prompts that of prompt tuning."
)


def write_report(store: Store, profile: Profile, directory: Path, findings: Sequence[Finding] = FINDINGS) -> Path:
    """Write `report.md` and its plots.

    Args:
        store: the results.
        profile: which runs belong to the report.
        directory: of the report; it is created.
        findings: the findings that the report judges.

    Raises:
        ValueError: there are no results.
    """
    standings = Standings(store, profile)
    if not standings.tested:
        raise ValueError(f"{store.directory} has no results on test rows; run `python -m benchmarks.quality` first.")
    directory.mkdir(parents=True, exist_ok=True)
    sections = [
        ["# Quality of prompts on real models"],
        ["## How it was measured", *_measured(standings)],
        ["## Scores", SCORES, *_scores(standings, directory)],
        ["## Comparisons", COMPARISONS, *comparisons(standings)],
        ["## Where softhooks is behind, and what was tried", *gaps(standings)],
    ]
    if findings:
        judged = [part for finding in findings for part in _finding(finding, store, directory)]
        sections.append(["## Findings of papers", RULE, RATES, *judged])
    path = directory / "report.md"
    path.write_text("\n\n".join(part for section in sections for part in section) + "\n", encoding="utf-8")
    return path


def _measured(standings: Standings) -> list[str]:
    """Describe versions, machine, date and settings, as far as the results contain them."""
    records = [*standings.searched, *standings.tested]
    known: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, value in record.versions.items():
            known[name].add(value)
    trained = [record.run for record in records if record.run.steps]
    searched = [record.run for record in standings.searched]
    settings = {
        "optimizer steps": _values(run.steps for run in trained),
        "batch size": _values(record.extra["batch_size"] for record in records if "batch_size" in record.extra),
        "seeds": _values(record.run.seed for record in standings.tested),
        "learning rates tried on development rows": ", ".join(_sorted(f"{run.learning_rate:g}" for run in searched)),
        "seeds on development rows": _values(run.seed for run in searched),
        "runs of the comparison without a result": str(len(standings.missing)),
    }
    described = {"date": MISSING} | {name: ", ".join(sorted(known[name])) for name in sorted(known)}
    return [
        _items(f"{name}: {value}" for name, value in described.items()),
        _items(f"{name}: {value or MISSING}" for name, value in settings.items()),
        *([_chosen(standings)] if searched else []),
        *_prompts(standings),
        _items(f"{model}: {DESCRIPTIONS[model]}" for model in standings.profile.tasks),
        _parts(standings),
    ]


def _chosen(standings: Standings) -> str:
    """Describe how learning rates were chosen."""
    profile, store = standings.profile, standings.store
    seeds = len({record.run.seed for record in standings.searched})
    several = " and is used for all numbers of shots" if len(profile.shots) > 1 else ""
    ends = [
        f"{label_of(name)} on {model}"
        for model in profile.tasks
        for name in contestants_of(profile, model)
        if at_an_end(profile, store, model, name)
    ]
    return (
        f"Learning rates were chosen on the development rows of {' and '.join(profile.searched)}, one for each model and "
        f"contestant, with {search_shots(profile)} shots and {'one seed' if seeds == 1 else f'{seeds} seeds'}. "
        f"Each contestant tried three; if the best was the highest or the lowest, it tried the next one, up to {EXTENSIONS} "
        f"times. The rate with the highest mean score was chosen{several}; ties went to the smallest rate. Other tasks had no "
        "part in the choice, and the test rows were scored only with this rate. "
        + (f"The chosen rate is the highest or the lowest that was tried for {', '.join(ends)}." if ends else "")
    ).strip()


def _prompts(standings: Standings) -> list[str]:
    """List the templates, and say which one each prompted baseline uses."""
    items = []
    for task, model in standings.pairs():
        for contestant in (ZERO_SHOT, FEW_SHOT) if not is_encoder(model) else ():
            options = chosen_prompt(standings.profile, standings.store, task, model, contestant)
            if options is None:
                continue
            template, examples = TEMPLATES[task][dict(options)["template"]], dict(options).get("examples")
            words = {ZERO_SHOT: "", FEW_SHOT: f", {examples} examples" if examples else ", as many examples as fit"}[
                contestant
            ]
            words += " of each class" if examples and task not in GENERATED else ""
            items.append(f"{task}, {model}, {label_of(contestant)}: {_shown(template)}{words}")
    if not items:
        return []
    trained = [f"{task}: {_shown(TEMPLATES[task][0])}" for task in dict.fromkeys(task for task, _ in standings.pairs())]
    return [
        "Templates of the language model's inputs, for everything that is trained:",
        _items(trained),
        "The prompts of the baselines that were best on the development rows, among all templates and numbers of examples:",
        _items(items),
    ]


def _shown(template: Template) -> str:
    """Return a template as code."""
    text = f"{template.before}{{text}}{template.question} {{answer}}".replace("\n", "\\n")
    return f"`{text}`{', after the instruction' if template.instructed else ''}"


def _parts(standings: Standings) -> str:
    """Return a table of the number of rows in each part of the tasks."""
    known = {record.run.task: record.extra["rows"] for record in standings.tested if "rows" in record.extra}
    tasks = dict.fromkeys(task for task, _ in standings.pairs())
    rows = [[task, *(str(known.get(task, {}).get(part, MISSING)) for part in PARTS)] for task in tasks]
    return markdown_table(["task", "training rows", "development rows", "test rows"], rows)


def _scores(standings: Standings, directory: Path) -> list[str]:
    parts = []
    for task, model in standings.pairs():
        own = [record for record in standings.tested if record.run.task == task]
        if not own:
            parts += [f"### {task}, {model}", MISSING]
            continue
        score = score_name(own)
        parts += [f"### {task}, {model}: {score}", scores_table(standings, task, model)]
        parts += [TWO_SEEDS] if standings.profile.seeds[model] == 2 else []
        parts += _plots(standings, task, model, score, directory)
    return parts


def _plots(standings: Standings, task: str, model: str, score: str, directory: Path) -> list[str]:
    """Write the plots of a task and a model, and return the Markdown that shows them."""
    series: dict[str, list[Point]] = {}
    sizes: dict[str, Point] = {}
    common = _common_shots(standings, task, model)
    for name in standings.contestants(task, model):
        cells = {shots: standings.cell(task, model, name, shots) for shots in (0, *standings.profile.shots)}
        found = {shots: cell for shots, cell in cells.items() if cell is not None and cell.records}
        if not found:
            continue
        series[name] = [Point(shots, summarize(cell.records)) for shots, cell in found.items()]
        shown = found.get(common) or found.get(0)
        if shown is not None:
            sizes[name] = _size(shown)
    by_shots, by_size = directory / f"{task}-{model}-shots.png", directory / f"{task}-{model}-trained.png"
    plot_trained(sizes, by_size, title=f"{task}, {model}, {common} shots", score=score)
    images = [f"![{score} against trained parameters]({by_size.name})"]
    if len(standings.profile.shots) > 1:
        plot_shots(series, by_shots, title=f"{task}, {model}", score=score)
        images.insert(0, f"![{score} against shots]({by_shots.name})")
    return images


def _common_shots(standings: Standings, task: str, model: str) -> int:
    """Return the number of shots for which most contestants have results; of equal ones, the largest."""
    names = standings.contestants(task, model)

    def count(shots: int) -> int:
        cells = [standings.cell(task, model, name, shots) for name in names]
        return sum(cell is not None and bool(cell.records) for cell in cells)

    return max(standings.profile.shots, key=lambda shots: (count(shots), shots))


def _size(cell: Cell) -> Point:
    return Point(cell.records[0].trained, summarize(cell.records))


def _finding(finding: Finding, store: Store, directory: Path) -> list[str]:
    """Judge a finding, write its plot, and return its section."""
    verdict = finding.judge(store)
    plot = directory / f"finding-{finding.name}.png"
    rows = []
    for arm in finding.arms:
        records = arm.records(store)
        rate = f"{arm.runs[0].learning_rate:g}" if arm.runs[0].steps else ""
        rows.append([arm.label, str(summarize(records)) if records else MISSING, rate])
    run = finding.runs[0]
    return [
        f"### {finding.claim}",
        f"{finding.paper}. Here: {run.task}, {run.model}, {run.shots} shots, {len(finding.arms[0].runs)} seeds.",
        f"**{verdict.judgment.capitalize()}.** {verdict.sentence}",
        markdown_table(["", "score", "learning rate"], rows),
        *([f"![{finding.name}]({plot.name})"] if finding.plot(store, plot) else []),
    ]


def _items(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _values(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _sorted(rates: Iterable[str]) -> list[str]:
    return sorted(set(rates), key=float)
