"""Prefix tuning with few rows: the MLP, initial values from the instruction, and a prefix in every layer.

For `init="text"`, the runner passes the task's instruction as `init_text`; the contestants of the main comparison start from it.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import FEW_SHOTS, LENGTH
from benchmarks.quality.models import SMOLLM2

PAPER = "Li & Liang 2021, arXiv:2101.00190"


def _prefix(init: str, projection: bool) -> Arm:
    return arm(
        f"{'instruction' if init == 'text' else 'random'}, {'with' if projection else 'without'} MLP",
        "prefix_tuning",
        SMOLLM2,
        rate="prefix_tuning with MLP" if projection else "prefix_tuning",
        shots=FEW_SHOTS,
        num_virtual_tokens=LENGTH,
        init=init,
        projection=projection,
    )


_INSTRUCTION = arm("instruction, without MLP", "prefix_tuning", SMOLLM2, shots=FEW_SHOTS)
WITH_MLP = _prefix("text", projection=True)
_RANDOM, _RANDOM_MLP = _prefix("random", projection=False), _prefix("random", projection=True)
_INPUT = arm("instruction, input only", "prompt_tuning", SMOLLM2, shots=FEW_SHOTS)
_PREFIXES = (_INSTRUCTION, WITH_MLP, _RANDOM, _RANDOM_MLP)

FINDINGS = (
    Finding(
        "prefix_mlp",
        PAPER,
        "A prefix that is computed by an MLP trains better than one whose keys and values are trained directly.",
        _PREFIXES,
        all_hold(Expect(_RANDOM_MLP, _RANDOM), Expect(WITH_MLP, _INSTRUCTION)),
        bars(_PREFIXES, "Prefix tuning: MLP"),
    ),
    Finding(
        "prefix_init",
        PAPER,
        "With few training rows, a prefix initialized with the keys and values of words is better than a random one.",
        _PREFIXES,
        all_hold(Expect(_INSTRUCTION, _RANDOM), Expect(WITH_MLP, _RANDOM_MLP)),
        bars(_PREFIXES, "Prefix tuning: initial values"),
    ),
    Finding(
        "prefix_layers",
        PAPER,
        "Virtual tokens at the input alone are worse than a prefix in every layer.",
        (_INSTRUCTION, WITH_MLP, _INPUT),
        all_hold(Expect(_INSTRUCTION, _INPUT), Expect(WITH_MLP, _INPUT)),
        bars((_INSTRUCTION, WITH_MLP, _INPUT), "Prefix tuning: every layer and input only"),
    ),
)
