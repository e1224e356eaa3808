"""Runs of softhooks' methods with the learning rates that were chosen for PEFT's versions.

Where the two rates differ, these runs show whether a difference between the two scores comes from the rates.
"""

from __future__ import annotations

from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.plan import Profile, chosen_rate, contestants_of, search_shots, shots_of
from benchmarks.quality.records import Record, Run, Store


def same_rate_runs(profile: Profile, store: Store) -> list[Run]:
    """Return the runs of all methods whose rate differs from that of PEFT's version, with `search_shots` rows of each class."""
    return [
        run
        for model, tasks in profile.tasks.items()
        for peft in contestants_of(profile, model)
        for task in tasks
        for run in _runs(profile, store, task, model, peft)
    ]


def same_rate_records(profile: Profile, store: Store, task: str, model: str, peft: str) -> list[Record]:
    """Return the results of softhooks' version of a method of PEFT with PEFT's rate.

    The list is empty if both have the same rate, or if some results are missing.
    """
    runs = _runs(profile, store, task, model, peft)
    records = [record for run in runs if (record := store.get(run)) is not None]
    return records if len(records) == len(runs) else []


def _runs(profile: Profile, store: Store, task: str, model: str, peft: str) -> list[Run]:
    own, shots = CONTESTANTS[peft].twin, search_shots(profile)
    if own is None or own not in contestants_of(profile, model) or shots not in shots_of(profile, task, model, own):
        return []
    own_rate, rate = (chosen_rate(profile, store, model, name) for name in (own, peft))
    if own_rate is None or rate is None or own_rate == rate:
        return []
    steps = profile.steps[model](shots)
    return [Run(task, model, own, shots, steps, rate, seed) for seed in range(profile.seeds[model])]
