"""The results of the main comparison, by task, model, contestant and number of shots."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.quality.contestants import CONTESTANTS, PEFT, SOFTHOOKS
from benchmarks.quality.plan import (
    Profile,
    baseline_runs,
    contestants_of,
    final_runs,
    prompt_runs,
    prompted_runs,
    search_runs,
    shots_of,
)
from benchmarks.quality.records import Part, Record, Run, Store
from benchmarks.quality.run import NO_MODEL
from benchmarks.quality.statistics import Summary, rate_scores, summarize

LORA = "lora"
BASELINES = {
    "majority": "majority",
    "first_sentence": "first sentence",
    "tfidf": "tf-idf + logistic regression",
    "zero_shot": "zero-shot",
    "few_shot": "few-shot in context",
}


@dataclass
class Cell:
    """The runs that differ only in the seed.

    Attributes:
        planned: the number of seeds that the profile has.
        records: the results that are there.
    """

    planned: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def summary(self) -> Summary | None:
        """The mean score, or None if there are no results."""
        return summarize(self.records) if self.records else None


def label_of(contestant: str) -> str:
    """Return the name of a contestant in tables and plots."""
    if contestant not in CONTESTANTS:
        return BASELINES.get(contestant, contestant)
    known = CONTESTANTS[contestant]
    return f"{known.label} ({known.library})" if known.library in (SOFTHOOKS, PEFT) else known.label


def is_softhooks(contestant: str) -> bool:
    """Return whether a contestant is a method of softhooks."""
    return contestant in CONTESTANTS and CONTESTANTS[contestant].library == SOFTHOOKS


class Standings:
    """The results of a profile's runs, apart from the experiments on findings.

    Attributes:
        profile: which runs there are.
        store: the results of all runs.
        searched, tested: the results on the development rows, and on the test rows.
        missing: the runs without a result, as far as learning rates are chosen.
    """

    def __init__(self, store: Store, profile: Profile) -> None:
        self.profile, self.store = profile, store
        planned = [*baseline_runs(profile), *prompted_runs(profile, store), *final_runs(profile, store)]
        prompts, search = prompt_runs(profile), search_runs(profile, store)
        self.searched = [record for run in search if (record := store.get(run)) is not None]
        self.missing = store.missing([*prompts, *search, *planned])
        self._cells: dict[tuple[str, str, str, int], Cell] = {}
        for run in planned:
            cell = self._cells.setdefault(_key(run), Cell())
            cell.planned += 1
            record = store.get(run)
            if record is not None:
                cell.records.append(record)
        self.tested = [record for cell in self._cells.values() for record in cell.records]

    def pairs(self) -> list[tuple[str, str]]:
        """Return the profile's tasks and models."""
        return [(task, model) for model, tasks in self.profile.tasks.items() for task in tasks]

    def contestants(self, task: str, model: str) -> list[str]:
        """Return the contestants of a task and a model: baselines, and then those that are tuned."""
        baselines = [name for name in BASELINES if any(key[:3] in _places(task, model, name) for key in self._cells)]
        tuned = [name for name in contestants_of(self.profile, model) if shots_of(self.profile, task, model, name)]
        return [*baselines, *tuned]

    def cell(self, task: str, model: str, contestant: str, shots: int) -> Cell | None:
        """Return the results of a cell, or None if the profile has no such runs."""
        for place in _places(task, model, contestant):
            if (*place, shots) in self._cells:
                return self._cells[(*place, shots)]
        # The runs of a contestant whose learning rate is not chosen yet are not planned in detail.
        waiting = contestant in CONTESTANTS and shots in shots_of(self.profile, task, model, contestant)
        return Cell(self.profile.seeds[model]) if waiting else None

    def best_method(self, task: str, model: str, shots: int) -> tuple[str, Part] | None:
        """Return the best method of softhooks, and the part on which it was chosen.

        That is `development`, if all methods with test results have results on it, else `test`.
        """
        found: dict[str, float] = {}
        tuned: dict[str, float | None] = {}
        for name in filter(is_softhooks, self.contestants(task, model)):
            cell = self.cell(task, model, name, shots)
            if cell is not None and cell.summary is not None:
                found[name] = cell.summary.mean
                tuned[name] = self._development_score(cell.records[0].run)
        if not found:
            return None
        known = {name: score for name, score in tuned.items() if score is not None}
        if len(known) == len(found):
            return max(known, key=lambda name: known[name]), "development"
        return max(found, key=lambda name: found[name]), "test"

    def _development_score(self, run: Run) -> float | None:
        """Return a contestant's score on the development rows with the learning rate of a run.

        If the task has no part in the choice of learning rates, that is the mean over the tasks that have.
        """
        own = [r for r in self.searched if (r.run.model, r.run.contestant) == (run.model, run.contestant)]
        if run.task in self.profile.searched:
            own = [record for record in own if record.run.task == run.task]
        return rate_scores(own).get(run.learning_rate)


def _key(run: Run) -> tuple[str, str, str, int]:
    return run.task, run.model, run.contestant, run.shots


def _places(task: str, model: str, contestant: str) -> tuple[tuple[str, str, str], ...]:
    """Return where the results of a contestant may be: some baselines have no model."""
    return (task, model, contestant), (task, NO_MODEL, contestant)
