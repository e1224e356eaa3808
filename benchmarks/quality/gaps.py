"""Where softhooks' methods score lower than LoRA or PEFT's versions of them, what the results say, and what was tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from benchmarks.quality.comparisons import against_peft, common_records
from benchmarks.quality.contestants import CONTESTANTS, VARIANT
from benchmarks.quality.plan import chosen_rate, contestants_of, search_shots
from benchmarks.quality.standings import LORA, Standings, is_softhooks, label_of
from benchmarks.quality.statistics import Comparison, compare, rate_scores
from benchmarks.quality.tables import markdown_table

GAPS = (
    "Cells of the tables above in which all softhooks' methods score more than one standard error below LoRA, and methods that "
    "score more than one standard error below PEFT's version of them. LoRA changes the weights of every linear layer, with many "
    "more parameters than a prompt has. If that is the reason, scores rise with the number of parameters, and the rank "
    "correlation of the two among softhooks' methods is near 1; near 0, it is not the reason. With a single seed for the choice "
    "of the learning rate, a method and PEFT's version of it may get different rates by chance."
)
TRIED = (
    "What was tried, on the development rows: each contestant with each learning rate, one seed. A score is the mean over "
    "{tasks}. The chosen rate is bold."
)
FEW_METHODS = 3
"""The smallest number of methods for which a rank correlation is given."""


def gaps(standings: Standings) -> list[str]:
    """Return the sentences about what is behind, and a table for each model of what was tried."""
    items = []
    for task, model in standings.pairs():
        for shots in standings.profile.shots:
            place = f"{task}, {model}, {shots} shots"
            behind = [_behind_lora(standings, task, model, shots), *_behind_peft(standings, task, model, shots)]
            items += [f"- {place}: {sentence}" for sentence in behind if sentence]
    parts = [GAPS, "\n".join(items)] if items else ["No cell of the tables above has such a difference."]
    for model in standings.profile.tasks:
        parts += [f"### {model}: what was tried", _tried(standings, model)]
    return parts


def _behind_lora(standings: Standings, task: str, model: str, shots: int) -> str | None:
    """Say how far the best method is below LoRA, and how scores depend on trained parameters; None if one is on a par."""
    compared = _with_lora(standings, task, model, shots)
    if not compared or any(found.outcome != "worse" for found in compared.values()):
        return None
    best = max(compared, key=lambda name: compared[name].first.mean)
    trained = {name: _trained(standings, task, model, name, shots) for name in (*compared, LORA)}
    scores = f"{compared[best].first}, against LoRA, {compared[best].second}"
    sentences = [
        f"{label_of(best)}, the best of softhooks' methods, {scores}.",
        f"It trains {trained[best]:,} parameters, LoRA {trained[LORA]:,}.",
    ]
    numbers = [[trained[name] for name in compared], [found.first.mean for found in compared.values()]]
    if len(compared) >= FEW_METHODS and all(len(set(values)) > 1 for values in numbers):
        rank = stats.spearmanr(*numbers).statistic
        sentences.append(
            f"Rank correlation of trained parameters and scores among softhooks' {len(compared)} methods: {rank:+.2f}."
        )
    untested = [name for name in _level_elsewhere(standings, task, model, shots) if name not in compared]
    if untested:
        names = ", ".join(label_of(name) for name in untested)
        sentences.append(
            f"Not tested with {shots} shots: {names}, on a par with LoRA at {search_shots(standings.profile)}."
        )
    return " ".join(sentences)


def _with_lora(standings: Standings, task: str, model: str, shots: int) -> dict[str, Comparison]:
    """Compare each method of softhooks that has results with LoRA."""
    found = {}
    for name in filter(is_softhooks, standings.contestants(task, model)):
        own, lora = common_records(standings, task, model, name, LORA, shots)
        if own and lora:
            found[name] = compare(own, lora)
    return found


def _level_elsewhere(standings: Standings, task: str, model: str, shots: int) -> list[str]:
    """Return the methods that are on a par with LoRA, or better, with the number of shots of the search for learning rates."""
    most = search_shots(standings.profile)
    if shots == most:
        return []
    compared = _with_lora(standings, task, model, most)
    return [name for name, found in compared.items() if found.outcome != "worse"]


def _trained(standings: Standings, task: str, model: str, contestant: str, shots: int) -> int:
    cell = standings.cell(task, model, contestant, shots)
    assert cell is not None  # it has results that were compared
    return round(np.mean([record.trained for record in cell.records]))


def _behind_peft(standings: Standings, task: str, model: str, shots: int) -> list[str]:
    """Say for each method that is below PEFT's version what the learning rates and the seeds have to do with it."""
    sentences = []
    compared = against_peft(standings, task, model, shots)
    for peft, known in CONTESTANTS.items():
        if known.twin is None:
            continue
        own = known.twin
        found = [one for one in compared if one[1].startswith(label_of(own)) and one[2] == label_of(peft)]
        if not found or found[0][3].outcome != "worse":
            continue
        first = found[0][3]
        sentence = f"{label_of(own)}, {first.first}, against PEFT's, {first.second}."
        sentences.append(" ".join([sentence, *_rates(standings, model, own, peft, [one[3] for one in found[1:]])]))
    return sentences


def _rates(standings: Standings, model: str, own: str, peft: str, same: Sequence[Comparison]) -> list[str]:
    """Say whether both have the same learning rate, and what the result is with the same."""
    rates = [chosen_rate(standings.profile, standings.store, model, name) for name in (own, peft)]
    if rates[0] is None or rates[1] is None:
        return []
    if rates[0] == rates[1]:
        return [f"Both have the learning rate {rates[0]:g}."]
    sentences = [f"Learning rates: {rates[0]:g}, and PEFT's {rates[1]:g}."]
    sentences += [f"With PEFT's rate: {one.first}, {one.sentence}." for one in same]
    return sentences


def _tried(standings: Standings, model: str) -> str:
    """Return what each contestant scored on the development rows with each learning rate, the best contestant first."""
    profile = standings.profile
    scores = {}
    for name in contestants_of(profile, model):
        found = rate_scores([r for r in standings.searched if (r.run.model, r.run.contestant) == (model, name)])
        if found:
            scores[name] = found
    rates = sorted({rate for found in scores.values() for rate in found})
    rows = []
    for name in sorted(scores, key=lambda name: -max(scores[name].values())):
        chosen = chosen_rate(profile, standings.store, model, name)
        cells = [_score(scores[name].get(rate), rate == chosen) for rate in rates]
        rows.append([label_of(name), *cells])
    variants = [label_of(name) for name in scores if CONTESTANTS[name].library == VARIANT]
    tasks = " and ".join(task for task in profile.tasks[model] if task in profile.searched)
    text = TRIED.format(tasks=tasks) + (f" Not part of softhooks: {', '.join(variants)}." if variants else "")
    return text + "\n\n" + markdown_table(["contestant", *(f"{rate:g}" for rate in rates)], rows)


def _score(score: float | None, chosen: bool) -> str:
    if score is None:
        return ""
    return f"**{score:.3f}**" if chosen else f"{score:.3f}"
