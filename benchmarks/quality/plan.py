"""Which runs a profile has, in the order in which they are executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.models import MINILM, SMOLLM2, is_encoder
from benchmarks.quality.records import Run, Store
from benchmarks.quality.run import FEW_SHOT, NO_MODEL, ZERO_SHOT
from benchmarks.quality.statistics import choose_rate

SHOTS = (8, 32, 150)
SEARCH_SHOTS = 32
"""Learning rates are chosen with this many rows of each class, and used with fewer and more rows too."""

EVERY_SHOTS = ("lora", "prompt_tuning", "prefix_tuning", "peft_prompt_tuning")
"""The contestants that tune the language model with all numbers of rows; the others only with `SEARCH_SHOTS`."""

CLASSIFIED = ("glosses", "sections", "docstrings")
GENERATED = ("synopses",)


@dataclass(frozen=True)
class Profile:
    """The size of the benchmark.

    Attributes:
        tasks: the tasks of each model.
        contestants: the contestants of each model; None for all.
        shots: training rows of each class.
        seeds: seeds of each model.
        steps: optimizer steps of each model, as a function of the training rows of each class.
        findings: whether it includes the experiments on findings, which need the rows of other tasks.
    """

    name: str
    tasks: dict[str, tuple[str, ...]]
    contestants: dict[str, tuple[str, ...] | None]
    shots: tuple[int, ...]
    seeds: dict[str, int]
    steps: dict[str, Callable[[int], int]]
    findings: bool = True


FULL = Profile(
    "full",
    tasks={MINILM: CLASSIFIED, SMOLLM2: (*CLASSIFIED, *GENERATED)},
    contestants={MINILM: None, SMOLLM2: None},
    shots=SHOTS,
    seeds={MINILM: 5, SMOLLM2: 3},
    steps={
        MINILM: lambda shots: 300 if shots > SEARCH_SHOTS else 150,
        SMOLLM2: lambda shots: 200 if shots > 32 else 100,
    },
)
SMALL = Profile(
    "small",
    tasks={MINILM: ("docstrings",)},
    contestants={MINILM: ("head", "lora", "prompt_tuning", "peft_prompt_tuning", "prefix_tuning")},
    shots=(8,),
    seeds={MINILM: 2},
    steps={MINILM: lambda shots: 60},
    findings=False,
)
PROFILES = {profile.name: profile for profile in (SMALL, FULL)}


def baseline_runs(profile: Profile) -> list[Run]:
    """Return the runs that train no prompt: they need no learning rate."""
    runs = []
    for model, tasks in profile.tasks.items():
        for task in tasks:
            without_model = ("first_sentence",) if task in GENERATED else ("majority", "tfidf")
            seeds = range(profile.seeds[model])
            runs += [
                Run(task, NO_MODEL, name, k, seed=s) for name in without_model for k in profile.shots for s in seeds
            ]
            if not is_encoder(model):
                runs.append(Run(task, model, ZERO_SHOT))
                runs += [Run(task, model, FEW_SHOT, k, seed=seed) for k in profile.shots for seed in seeds]
    return list(dict.fromkeys(runs))


def search_runs(profile: Profile) -> list[Run]:
    """Return the runs that choose the learning rates, on the development rows."""
    return [
        Run(task, model, name, shots, profile.steps[model](shots), rate, part="development")
        for model, task, name in _tuned(profile)
        for shots in [search_shots(profile)]
        for rate in CONTESTANTS[name].rates(is_encoder(model)) or ()
    ]


def final_runs(profile: Profile, store: Store) -> list[Run]:
    """Return the runs on the test rows; those whose learning rate is not yet chosen are left out."""
    runs = []
    for model, task, name in _tuned(profile):
        rate = chosen_rate(profile, store, task, model, name)
        if rate is not None:
            for shots in shots_of(profile, model, name):
                steps = profile.steps[model](shots)
                runs += [Run(task, model, name, shots, steps, rate, seed) for seed in range(profile.seeds[model])]
    return runs


def chosen_rate(profile: Profile, store: Store, task: str, model: str, contestant: str) -> float | None:
    """Return the learning rate with the best score on the development rows, or None before all have been tried."""
    searched = [
        run for run in search_runs(profile) if (run.task, run.model, run.contestant) == (task, model, contestant)
    ]
    records = [record for run in searched if (record := store.get(run)) is not None]
    return choose_rate(records) if searched and len(records) == len(searched) else None


def shots_of(profile: Profile, model: str, contestant: str) -> tuple[int, ...]:
    """Return the numbers of training rows with which a contestant is tested."""
    if is_encoder(model) or contestant in EVERY_SHOTS:
        return profile.shots
    return (search_shots(profile),)


def search_shots(profile: Profile) -> int:
    """Return the number of training rows of each class with which learning rates are chosen."""
    return SEARCH_SHOTS if SEARCH_SHOTS in profile.shots else profile.shots[0]


def _tuned(profile: Profile) -> list[tuple[str, str, str]]:
    """Return model, task and contestant of everything that is trained."""
    names: dict[str, Sequence[str]] = {
        model: chosen or [name for name, c in CONTESTANTS.items() if c.rates(is_encoder(model))]
        for model, chosen in profile.contestants.items()
    }
    return [(model, task, name) for model, tasks in profile.tasks.items() for task in tasks for name in names[model]]
