"""Where the learning rates of the experiments come from.

Those of the comparison's contestants are the rates that it chose on the development rows. CPT and the prefix with an MLP take
no part in the comparison, so they have a search of their own: the first seed of a setting, on the development rows. A multitask
prompt on SmolLM2 has the rate of prompt tuning, because each run trains prompts of source tasks first; a cartridge has the rate
of its paper, because its task has no development rows.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.quality.contestants import CONTESTANTS, LADDER
from benchmarks.quality.findings import cpt, prefix
from benchmarks.quality.findings.framework import Arm
from benchmarks.quality.models import SMOLLM2, is_encoder
from benchmarks.quality.plan import Profile, chosen_rate
from benchmarks.quality.records import Run, Store
from benchmarks.quality.statistics import choose_rate

SEARCHED: dict[tuple[str, str], Arm] = {
    (SMOLLM2, "prefix_tuning with MLP"): prefix.WITH_MLP,
    (SMOLLM2, "cpt"): cpt.TRAINED,
    (SMOLLM2, "peft_cpt"): cpt.PEFT,
}
TRIED = LADDER[3:6]
SHARED = {(SMOLLM2, "multitask_prompt_tuning"): (SMOLLM2, "prompt_tuning")}


def rate_runs() -> list[Run]:
    """Return the runs that choose rates, on the development rows."""
    return [run for key in SEARCHED for run in _runs(key)]


def found_rate(profile: Profile, store: Store, key: tuple[str, str]) -> float | None:
    """Return the rate that the results choose for an entry of `RATES`; None if they are not there, or none was searched for."""
    model, contestant = key = SHARED.get(key, key)
    if key in SEARCHED:
        runs = _runs(key)
        records = [record for run in runs if (record := store.get(run)) is not None]
        return choose_rate(records) if len(records) == len(runs) else None
    searched = CONTESTANTS[contestant].rates(is_encoder(model)) is not None
    return chosen_rate(profile, store, model, contestant) if searched else None


def _runs(key: tuple[str, str]) -> list[Run]:
    return [replace(SEARCHED[key].runs[0], learning_rate=rate, part="development") for rate in TRIED]
