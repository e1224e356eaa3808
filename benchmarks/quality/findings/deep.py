"""P-tuning v2: keys and values in all six layers of MiniLM, in some layers, and virtual tokens at the input only.

All start at random.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import LENGTH
from benchmarks.quality.models import MINILM

PAPER = "Liu et al. 2021 (P-tuning v2), arXiv:2110.07602"
LAYERS = 6


def _layers(label: str, *layers: int) -> Arm:
    return arm(label, "p_tuning_v2", MINILM, num_virtual_tokens=LENGTH, layers=layers)


_INPUT = arm("input only", "prompt_tuning", MINILM, num_virtual_tokens=LENGTH, init="random")
_FIRST = _layers("first layer", 0)
_LOWER = _layers("lower three layers", 0, 1, 2)
_UPPER = _layers("upper three layers", 3, 4, 5)
_ALL = _layers("all six layers", *range(LAYERS))
_ARMS = (_INPUT, _FIRST, _LOWER, _UPPER, _ALL)

FINDINGS = (
    Finding(
        "deep",
        PAPER,
        "Prompts in all layers are better than prompts at the input or in the first layer.",
        _ARMS,
        all_hold(Expect(_ALL, _INPUT), Expect(_ALL, _FIRST)),
        bars(_ARMS, "P-tuning v2: layers"),
    ),
    Finding(
        "deep_layers",
        PAPER,
        "With the same number of parameters, prompts in the upper layers are better than prompts in the lower layers.",
        (_LOWER, _UPPER),
        all_hold(Expect(_UPPER, _LOWER)),
        bars((_LOWER, _UPPER), "P-tuning v2: lower and upper layers"),
    ),
)
