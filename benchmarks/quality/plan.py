"""Which runs a profile has, in the order in which they are executed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality.contestants import CONTESTANTS, LADDER
from benchmarks.quality.models import MINILM, SMOLLM2, is_encoder
from benchmarks.quality.records import Record, Run, Store
from benchmarks.quality.run import FEW_SHOT, NO_MODEL, ZERO_SHOT
from benchmarks.quality.statistics import choose_rate
from benchmarks.quality.tasks import TEMPLATES

SHOTS = (8, 32, 150)
SEARCH_SHOTS = 32
"""Learning rates are chosen with this many rows of each class, and used with fewer and more rows too."""

EXTENSIONS = 2
"""How often a contestant tries another learning rate because its best is the highest or the lowest."""

CORE = ("head", "full", "lora", "prompt_tuning", "peft_prompt_tuning", "prefix_tuning", "peft_prefix_tuning")
"""The contestants that are tuned with all numbers of rows, and also on the tasks without a search for learning rates.

The others are tuned only with `SEARCH_SHOTS` rows of each class of the other tasks: all runs together take hours.
"""
STRONG = ("long_prefix_tuning", "llama_adapter_v2", "scaled_prefix_tuning", "context_tuning")
"""The best of the other contestants, on the development rows; they are tested on all tasks of the language model."""

EXAMPLES, GENERATED_EXAMPLES = (1, 2, None), (1, 3, 8)
"""The numbers of examples in a few-shot context, of each class or of all; None for as many as fit."""

CLASSIFIED = ("glosses", "docstrings", "sections")
GENERATED = ("synopses",)


@dataclass(frozen=True)
class Profile:
    """The size of the benchmark.

    Attributes:
        tasks: the tasks of each model.
        searched: the tasks on whose development rows learning rates are chosen, one rate for each model and contestant. The other
            tasks have no part in the choice.
        contestants: the contestants of each model; None for all.
        shots: training rows of each class.
        seeds: seeds of each model.
        steps: optimizer steps of each model, as a function of the training rows of each class.
        few_shots: the searched tasks of a model that are tested only with the number of shots of the search.
        findings: whether it includes the experiments on findings, which need the rows of other tasks.
    """

    name: str
    tasks: dict[str, tuple[str, ...]]
    searched: tuple[str, ...]
    contestants: dict[str, tuple[str, ...] | None]
    shots: tuple[int, ...]
    seeds: dict[str, int]
    steps: dict[str, Callable[[int], int]]
    few_shots: dict[str, tuple[str, ...]] = field(default_factory=dict)
    findings: bool = True


FULL = Profile(
    "full",
    tasks={SMOLLM2: (*CLASSIFIED, *GENERATED), MINILM: CLASSIFIED},
    searched=("glosses", "docstrings"),
    contestants={SMOLLM2: None, MINILM: None},
    shots=SHOTS,
    seeds={SMOLLM2: 3, MINILM: 5},
    steps={
        SMOLLM2: lambda shots: 200 if shots > SEARCH_SHOTS else 100,
        MINILM: lambda shots: 300 if shots > SEARCH_SHOTS else 150,
    },
    few_shots={MINILM: ("docstrings",)},
)
SMALL = Profile(
    "small",
    tasks={MINILM: ("docstrings",)},
    searched=("docstrings",),
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
    return list(dict.fromkeys(runs))


def prompt_runs(profile: Profile) -> list[Run]:
    """Return the runs that choose the template and the number of examples of zero-shot and few-shot prompts."""
    return [
        run
        for model, tasks in profile.tasks.items()
        if not is_encoder(model)
        for task in tasks
        for contestant in (ZERO_SHOT, FEW_SHOT)
        for run in _prompts(profile, task, model, contestant)
    ]


def prompted_runs(profile: Profile, store: Store) -> list[Run]:
    """Return the zero-shot and few-shot runs on the test rows, with the prompts that are best on the development rows."""
    runs = []
    for searched in prompt_runs(profile):
        options = chosen_prompt(profile, store, searched.task, searched.model, searched.contestant)
        if searched.options == options:
            seeds = range(profile.seeds[searched.model] if searched.contestant == FEW_SHOT else 1)
            runs += [
                replace(searched, shots=shots, seed=seed, part="test")
                for shots in _prompted_shots(profile, searched)
                for seed in seeds
            ]
    return runs


def _prompted_shots(profile: Profile, run: Run) -> tuple[int, ...]:
    """Return for how many training rows a prompt is tested: one number, if it holds fewer of them than there are."""
    if run.contestant == ZERO_SHOT:
        return (0,)
    return profile.shots if dict(run.options)["examples"] is None else (search_shots(profile),)


def chosen_prompt(
    profile: Profile, store: Store, task: str, model: str, contestant: str
) -> tuple[tuple[str, Any], ...] | None:
    """Return the options of the prompt with the best score on the development rows, or None before all have been tried."""
    runs = _prompts(profile, task, model, contestant)
    records = [record for run in runs if (record := store.get(run)) is not None]
    return max(records, key=lambda record: record.score).run.options if len(records) == len(runs) else None


def _prompts(profile: Profile, task: str, model: str, contestant: str) -> list[Run]:
    templates = range(len(TEMPLATES[task]))
    if contestant == ZERO_SHOT:
        return [Run(task, model, ZERO_SHOT, part="development", options=(("template", t),)) for t in templates]
    return [
        Run(
            task, model, FEW_SHOT, search_shots(profile), part="development", options=(("examples", e), ("template", t))
        )
        for t in templates
        for e in (GENERATED_EXAMPLES if task in GENERATED else EXAMPLES)
    ]


def search_runs(profile: Profile, store: Store) -> list[Run]:
    """Return the runs that choose the learning rates, on the development rows, as far as they are known.

    A contestant whose best rate is the highest or the lowest tries the next one of `LADDER`, up to `EXTENSIONS` times.
    """
    runs = []
    for model in profile.tasks:
        for name in contestants_of(profile, model):
            rates, _ = _searched(profile, store, model, name)
            runs += _search(profile, model, name, rates)
    return runs


def final_runs(profile: Profile, store: Store) -> list[Run]:
    """Return the runs on the test rows; those whose learning rate is not yet chosen are left out.

    Runs with `SEARCH_SHOTS` rows of each class come first.
    """
    runs = []
    for model, tasks in profile.tasks.items():
        rates = {name: chosen_rate(profile, store, model, name) for name in contestants_of(profile, model)}
        for task in tasks:
            for name, rate in rates.items():
                if rate is not None:
                    for shots in shots_of(profile, task, model, name):
                        steps, seeds = profile.steps[model](shots), range(profile.seeds[model])
                        runs += [Run(task, model, name, shots, steps, rate, seed) for seed in seeds]
    return sorted(runs, key=lambda run: run.shots != search_shots(profile))


def chosen_rate(profile: Profile, store: Store, model: str, contestant: str) -> float | None:
    """Return the learning rate with the best mean score on the development rows, or None before all have been tried."""
    _, records = _searched(profile, store, model, contestant)
    return choose_rate(records) if records else None


def at_an_end(profile: Profile, store: Store, model: str, contestant: str) -> bool:
    """Return whether the chosen learning rate is the highest or the lowest that was tried."""
    rates, records = _searched(profile, store, model, contestant)
    return bool(records) and choose_rate(records) in (min(rates), max(rates))


def contestants_of(profile: Profile, model: str) -> tuple[str, ...]:
    """Return the contestants that tune a model."""
    chosen = profile.contestants[model]
    return chosen or tuple(name for name, known in CONTESTANTS.items() if known.rates(is_encoder(model)))


def shots_of(profile: Profile, task: str, model: str, contestant: str) -> tuple[int, ...]:
    """Return the numbers of training rows with which a contestant is tested."""
    few = (search_shots(profile),)
    if task in profile.searched:
        return profile.shots if contestant in CORE and task not in profile.few_shots.get(model, ()) else few
    return few if contestant in (*CORE, *STRONG) else ()


def search_shots(profile: Profile) -> int:
    """Return the number of training rows of each class with which learning rates are chosen."""
    return SEARCH_SHOTS if SEARCH_SHOTS in profile.shots else profile.shots[0]


def _searched(profile: Profile, store: Store, model: str, contestant: str) -> tuple[list[float], list[Record]]:
    """Return the learning rates to try, and the results if all of these have been tried."""
    rates = list(CONTESTANTS[contestant].rates(is_encoder(model)) or ())
    most = len(rates) + EXTENSIONS
    while True:
        runs = _search(profile, model, contestant, rates)
        records = [record for run in runs if (record := store.get(run)) is not None]
        if not runs or len(records) < len(runs):
            return rates, []
        beyond = _beyond(rates, choose_rate(records))
        if beyond is None or len(rates) == most:
            return rates, records
        rates.append(beyond)


def _beyond(rates: list[float], best: float) -> float | None:
    """Return the rate of the ladder after the best, if that is the highest or the lowest."""
    index = LADDER.index(best) + (best == max(rates)) - (best == min(rates))
    return LADDER[index] if 0 <= index < len(LADDER) and LADDER[index] not in rates else None


def _search(profile: Profile, model: str, contestant: str, rates: list[float]) -> list[Run]:
    shots = search_shots(profile)
    steps = profile.steps[model](shots)
    tasks = [task for task in profile.tasks[model] if task in profile.searched]
    return [Run(task, model, contestant, shots, steps, rate, part="development") for rate in rates for task in tasks]
