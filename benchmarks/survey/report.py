"""The report, in Markdown, in which every number is read from the result files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.survey.checks import CHECKS
from benchmarks.survey.kinds import KINDS
from benchmarks.survey.modalities import TASKS

Results = dict[str, dict[str, dict[str, Any]]]
"""The findings by task and architecture."""

_CLASS = re.compile(r"\b[A-Z]\w*?(?:Model|LMHead|For[A-Z]\w+|Decoder|Encoder|Stack|Backbone)\w*\b")
INTRODUCTION = (
    "`make survey` attaches prompts to a tiny model, with random weights, of every architecture in transformers' Auto mappings, "
    "and writes this page. A row is one model with one head and one kind of prompt. It is *right* if every check that applies "
    "holds, *refused* if `attach` raises one of softhooks' errors, and *wrong* if a check fails."
)
COUNTS = "Each cell: right / refused / wrong."
ADD = (
    "A modality is a file of `modalities/`, which says how its tiny models are built, what a batch looks like, how a prompt is "
    "attached, and which checks apply; a check is a function in a file of `checks/`. Both are listed in the `__init__.py` of "
    "their folder."
)


def write_report(results: Results, versions: dict[str, str], path: Path) -> Path:
    """Write the report.

    Args:
        results: the findings of the tasks that are done.
        versions: the versions with which they were found.
        path: of the report.
    """
    sections = [
        ["# Survey of architectures", INTRODUCTION, _versions(results, versions)],
        ["## Counts", COUNTS, _counts(results)],
        ["## Wrong", _listed(_wrong(results), ("models", "prompts", "check", "finding"), "Nothing is wrong.")],
        ["## Refused by `attach`", _listed(_refused(results), ("prompts", "reason", "models"), "Nothing is refused.")],
        [
            "## Refused calls",
            "The prompt is right, but these calls raise an `UnsupportedModeError`.",
            _listed(_unsupported(results), ("prompts", "check", "reason", "models"), "No call is refused."),
        ],
        [
            "## Not built",
            "There is no tiny model of these architectures, or it does not run on the example without a prompt.",
            _listed(_not_built(results), ("models", "reason"), "Every architecture is built."),
        ],
        ["## Checks", _checks(results)],
        ["## Add to the survey", ADD],
    ]
    path.write_text("\n\n".join(part for section in sections for part in section) + "\n", encoding="utf-8")
    return path


# --- rows ----------------------------------------------------------------------------------------------------------------


def _rows(results: Results) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Every row: task, architecture, kind and finding."""
    for task, models in results.items():
        for arch, found in models.items():
            for kind, row in found.items():
                if isinstance(row, dict):
                    yield task, arch, kind, row


def _counts(results: Results) -> str:
    lines = []
    total: Counter[str] = Counter()
    for name, task in TASKS.items():
        if name not in results:
            continue
        models = results[name]
        counts: Counter[str] = Counter()
        for found in models.values():
            counts["built"] += any(isinstance(row, dict) for row in found.values())
            counts.update(f"{kind} {row['verdict']}" for kind, row in found.items() if isinstance(row, dict))
        counts["architectures"] = len(models)
        total += counts
        lines.append([task.title, *_cells(counts)])
    lines.append(["all", *_cells(total)])
    return _table(["task", "architectures", "built", *(kind.title for kind in KINDS.values())], lines)


def _cells(counts: Counter[str]) -> list[str]:
    verdicts = [
        " / ".join(str(counts[f"{kind} {verdict}"]) for verdict in ("right", "refused", "wrong")) for kind in KINDS
    ]
    return [str(counts["architectures"]), str(counts["built"]), *verdicts]


def _wrong(results: Results) -> Iterator[list[str]]:
    groups: dict[tuple[str, str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for task, arch, kind, row in _rows(results):
        for check, sentence in row.get("wrong", {}).items():
            groups[arch, check, sentence][task].append(kind)
    for (arch, check, sentence), tasks in sorted(groups.items()):
        kinds = {kind for found in tasks.values() for kind in found}
        yield [f"`{arch}` ({', '.join(tasks)})", _ordered(kinds), check, sentence]


def _refused(results: Results) -> Iterator[list[str]]:
    groups: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for _, arch, kind, row in _rows(results):
        if row.get("refusal"):
            groups[_general(row["refusal"])][kind][arch] += 1
    for reason, kinds in sorted(groups.items(), key=lambda item: (-_rows_in(item[1]), item[0])):
        yield [_ordered(kinds), reason, _models(arch for found in kinds.values() for arch in found)]


def _rows_in(kinds: dict[str, Counter[str]]) -> int:
    return sum(found.total() for found in kinds.values())


def _unsupported(results: Results) -> Iterator[list[str]]:
    groups: dict[tuple[str, str], tuple[set[str], list[str]]] = defaultdict(lambda: (set(), []))
    for _, arch, kind, row in _rows(results):
        for check, reason in row.get("unsupported", {}).items():
            kinds, models = groups[check, _general(reason)]
            kinds.add(kind)
            models.append(arch)
    for (check, reason), (kinds, models) in sorted(groups.items(), key=lambda item: item[0]):
        shown = f"{len(set(models))} architectures" if len(set(models)) > _MANY else _models(models)
        yield [_ordered(kinds), check, reason, shown]


_MANY = 40
"""Above this number, models with a refused call are counted instead of named."""


def _not_built(results: Results) -> Iterator[list[str]]:
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for task, models in results.items():
        for arch, found in models.items():
            for name in ("not built", "not finished"):
                if name in found:
                    groups[found[name]][arch].append(task)
    for reason, models in sorted(groups.items()):
        yield [", ".join(f"`{arch}` ({', '.join(tasks)})" for arch, tasks in sorted(models.items())), reason]


def _checks(results: Results) -> str:
    made: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for _, _, _, row in _rows(results):
        made.update(row.get("checked", ()))
        failed.update(row.get("wrong", {}).keys())
    names = [*CHECKS, *(name for name in failed if name not in CHECKS)]
    titles = {name: CHECKS[name].title if name in CHECKS else "no foreign exception is raised" for name in names}
    lines = [[name, titles[name], str(made[name] or ""), str(failed[name])] for name in names]
    return _table(["check", "what must hold", "rows", "wrong"], lines)


# --- words ---------------------------------------------------------------------------------------------------------------


def _versions(results: Results, versions: dict[str, str]) -> str:
    rows = sum(1 for _ in _rows(results))
    with_versions = ", ".join(f"{name} {value}" for name, value in versions.items())
    missing = [task.title for name, task in TASKS.items() if name not in results]
    return f"{rows} rows; {with_versions}." + (f" Not surveyed yet: {', '.join(missing)}." if missing else "")


def _general(reason: str) -> str:
    """An error's sentence without the name of the model's class."""
    return _CLASS.sub("the model", reason)


def _ordered(kinds: Iterable[str]) -> str:
    wanted = set(kinds)
    return ", ".join(kind for kind in KINDS if kind in wanted)


def _models(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(set(names)))


def _listed(rows: Iterable[list[str]], header: tuple[str, ...], none: str) -> str:
    lines = list(rows)
    return _table(list(header), lines) if lines else none


def _table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
