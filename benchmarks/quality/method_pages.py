"""Write what was measured for each method into its page in `docs/methods`: `python -m benchmarks.quality.method_pages`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.findings.framework import Finding
from benchmarks.quality.models import SHORT_NAMES
from benchmarks.quality.plan import GENERATED, PROFILES, chosen_rate, contestants_of, search_shots
from benchmarks.quality.records import Store
from benchmarks.quality.run import FEW_SHOT, ZERO_SHOT
from benchmarks.quality.standings import LORA, Cell, Standings, label_of
from benchmarks.quality.statistics import summarize
from benchmarks.quality.tables import markdown_table

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/methods"
RESULTS = Path(__file__).parent / "results"
MARKER = re.compile(r"(?<=^<!-- measured: )\w+(?= -->\n)", re.MULTILINE)
WORDS = "zero-shot or few-shot, the better"


@dataclass(frozen=True)
class Subject:
    """What a method's page shows.

    Attributes:
        contestant: of the comparison; None if the method is not one.
        findings: the names of the experiments on the method.
        others: contestants that are the same method with other options.
    """

    contestant: str | None
    findings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


SUBJECTS = {
    "prompt_tuning": Subject("prompt_tuning", ("prompt_length", "prompt_init", "chat_start", "schedule", "precision")),
    "prefix_tuning": Subject(
        "prefix_tuning", ("prefix_init", "prefix_mlp", "prefix_layers"), ("scaled_prefix_tuning", "long_prefix_tuning")
    ),
    "p_tuning": Subject("p_tuning", ("anchors",)),
    "p_tuning_v2": Subject("p_tuning_v2", ("deep", "deep_layers", "dropout")),
    "multitask_prompt_tuning": Subject("multitask_prompt_tuning", ("transfer", "transfer_parts")),
    "context_aware_prompt_tuning": Subject(None, ("cpt", "cpt_parts")),
    "llama_adapter": Subject("llama_adapter", ("zero_gate",), ("llama_adapter_v2",)),
    "residual_prompt_tuning": Subject("residual_prompt_tuning"),
    "context_tuning": Subject("context_tuning"),
    "cartridge": Subject(None, ("cartridge",)),
    "spot": Subject(None),
    "prompt_ensemble": Subject(None),
}
"""By the name in the page's comment `<!-- measured: NAME -->`."""


def measured(standings: Standings, name: str, findings: Sequence[Finding] = FINDINGS) -> str:
    """Return the section of a page; empty if there are no results.

    Args:
        standings: the results.
        name: the key in `SUBJECTS`.
        findings: the experiments from which those of the method are taken.
    """
    subject = SUBJECTS[name]
    parts = [] if subject.contestant is None else _comparison(standings, subject.contestant, subject.others)
    verdicts = []
    for finding in (one for one in findings if one.name in subject.findings):
        verdict = finding.judge(standings.store)
        if verdict.judgment != "not measured":
            verdicts.append(f"- {finding.claim} **{verdict.judgment.capitalize()}.** {verdict.sentence}")
    if verdicts:
        parts += ["Statements of papers, and our own advice, tested on a small scale:", "\n".join(verdicts)]
    if not parts:
        return ""
    link = "[How it was measured](../../benchmarks/README.md#quality)"
    return "\n\n".join(["## Measured", *parts, link]) + "\n"


def _comparison(standings: Standings, contestant: str, others: Sequence[str]) -> list[str]:
    """Return a table of the tasks in which a contestant, or one of the others, was tuned, and what is in it."""
    profile, shots = standings.profile, search_shots(standings.profile)
    peft = [name for name, known in CONTESTANTS.items() if known.twin == contestant]
    tried = {name for model in profile.tasks for name in contestants_of(profile, model)}
    own = [name for name in (contestant, *others) if name in tried]
    columns = [*own, *peft, LORA]
    rows, models, generated = [], [], []
    for task, model in standings.pairs():
        tuned = [_cell(standings, task, model, name, shots) for name in columns]
        if any(tuned[: len(own)]):
            models.append(model)
            generated += [task] if task in GENERATED else []
            cells = [*tuned, _best_words(standings, task, model)]
            rows.append([f"{task}, {SHORT_NAMES[model]}", *(str(one.summary) if one else "" for one in cells)])
    if not rows:
        return []
    for model in dict.fromkeys(models):
        rates = [chosen_rate(profile, standings.store, model, name) for name in columns]
        rows.append([f"learning rate, {SHORT_NAMES[model]}", *(f"{rate:g}" if rate else "" for rate in rates), ""])
    header = ["task, model", *(label_of(name) for name in columns), WORDS]
    seeds = ", ".join(f"{profile.seeds[model]} for {SHORT_NAMES[model]}" for model in dict.fromkeys(models))
    score = f"Accuracy (for {' and '.join(generated)}, ROUGE-L)" if generated else "Accuracy"
    text = (
        f"{score} on test rows, with {shots} training rows of each class: mean ± "
        f"standard error over seeds ({seeds}). Each contestant was trained for the same number of steps, with the learning rate "
        "that was best on development rows."
    )
    return [text, markdown_table(header, rows)]


def _cell(standings: Standings, task: str, model: str, contestant: str, shots: int) -> Cell | None:
    """Return the results of a contestant, or None if those of some seeds are missing."""
    cell = standings.cell(task, model, contestant, shots)
    return cell if cell is not None and cell.records and len(cell.records) == cell.planned else None


def _best_words(standings: Standings, task: str, model: str) -> Cell | None:
    """Return the results of the better of zero-shot and few-shot, or None if there are none."""
    places = ((ZERO_SHOT, 0), (FEW_SHOT, search_shots(standings.profile)))
    cells = [_cell(standings, task, model, name, shots) for name, shots in places]
    return max(
        (cell for cell in cells if cell is not None), key=lambda cell: summarize(cell.records).mean, default=None
    )


def with_measured(page: str, standings: Standings, findings: Sequence[Finding] = FINDINGS) -> str:
    """Return the text of a page in which everything after its comment is replaced by the results."""
    found = MARKER.search(page)
    if found is None:
        raise ValueError("the page has no comment `<!-- measured: NAME -->`; add one at its end.")
    kept = page[: page.index("\n", found.end()) + 1]
    section = measured(standings, found[0], findings)
    return f"{kept}\n{section}" if section else kept


def main() -> None:
    """Rewrite all pages."""
    standings = Standings(Store(RESULTS / "full"), PROFILES["full"])
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(with_measured(path.read_text(encoding="utf-8"), standings), encoding="utf-8")


if __name__ == "__main__":
    main()
