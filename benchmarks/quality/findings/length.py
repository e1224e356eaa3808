"""Prompt tuning: the number of virtual tokens, and their initial values.

For `init="class_labels"`, the runner passes the task's labels as `init_labels`. The contestant of the main comparison starts as
the task's instruction.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Expect, Finding, all_hold, arm, bars, lines
from benchmarks.quality.findings.settings import LENGTH
from benchmarks.quality.models import SMOLLM2

PAPER = "Lester et al. 2021, arXiv:2104.08691"
INITS = {"random": "random numbers", "vocab": "words", "class_labels": "class labels"}

_LENGTHS = {
    length: arm(
        f"{length} virtual token{'s' * (length > 1)}",
        "prompt_tuning",
        SMOLLM2,
        num_virtual_tokens=length,
        init="vocab",
    )
    for length in (1, 5, 20, 100)
}
_INITS = {
    init: arm(f"initialized from {source}", "prompt_tuning", SMOLLM2, num_virtual_tokens=LENGTH, init=init)
    for init, source in INITS.items()
} | {"text": arm("initialized from the instruction", "prompt_tuning", SMOLLM2)}

FINDINGS = (
    Finding(
        "prompt_length",
        PAPER,
        "Longer prompts are better, up to 20 to 100 virtual tokens.",
        tuple(_LENGTHS.values()),
        all_hold(
            Expect(_LENGTHS[20], _LENGTHS[1]),
            Expect(_LENGTHS[5], _LENGTHS[1], "not worse"),
            Expect(_LENGTHS[20], _LENGTHS[5], "not worse"),
            Expect(_LENGTHS[100], _LENGTHS[20], "not worse"),
        ),
        lines({"prompt tuning": _LENGTHS}, "Prompt tuning: length", "virtual tokens"),
    ),
    Finding(
        "prompt_init",
        PAPER,
        "Prompts initialized from a text or from class labels are better than prompts initialized at random.",
        tuple(_INITS.values()),
        all_hold(Expect(_INITS["text"], _INITS["random"]), Expect(_INITS["class_labels"], _INITS["random"])),
        bars(tuple(_INITS.values()), "Prompt tuning: initial values"),
    ),
)
