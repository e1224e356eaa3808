"""CPT: a trained few-shot context against in-context learning and prompt tuning, and the contribution of CPT's parts.

The context consists of as many of the run's training rows as fit into `CONTEXT_LIMIT` tokens (`baselines.py`); it is trained on
the same rows, as in the paper. A run with 0 steps is in-context learning: the runner attaches the prompt and scores it without
training.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import LENGTH
from benchmarks.quality.models import SMOLLM2

PAPER = "Blau et al. 2024 (CPT), arXiv:2410.17222"
SHOTS, CPT_STEPS = 1, 60
"""Training rows of each class, and optimizer steps: with the context before each row, a step takes several times as long."""

_DEFAULTS: dict[str, Any] = {"context_loss": True, "decay": 0.95, "epsilon_input": 0.2, "epsilon_format": 0.1}


def _cpt(label: str, steps: int = CPT_STEPS, **options: Any) -> Arm:
    return arm(label, "cpt", SMOLLM2, shots=SHOTS, steps=steps, **(_DEFAULTS | options))


TRAINED = _cpt("CPT")
_ICL = _cpt("in-context learning", steps=0)
_PLAIN = arm("prompt tuning", "prompt_tuning", SMOLLM2, shots=SHOTS, steps=CPT_STEPS, num_virtual_tokens=LENGTH)
PEFT = arm("PEFT's CPT", "peft_cpt", SMOLLM2, shots=SHOTS, steps=CPT_STEPS, **_DEFAULTS)
_NO_LOSS = _cpt("CPT without context loss", context_loss=False)
_NO_PROJECTION = _cpt("CPT without projection", epsilon_input=None, epsilon_format=None)
_NO_DECAY = _cpt("CPT without decay", decay=1.0)
_PARTS = (_NO_LOSS, _NO_PROJECTION, _NO_DECAY)

FINDINGS = (
    Finding(
        "cpt",
        PAPER,
        "CPT is better than in-context learning with the same examples, and than prompt tuning on them.",
        (TRAINED, PEFT, _ICL, _PLAIN),
        all_hold(Expect(TRAINED, _ICL), Expect(TRAINED, _PLAIN)),
        bars((TRAINED, PEFT, _ICL, _PLAIN), "CPT against in-context learning and prompt tuning"),
    ),
    Finding(
        "cpt_parts",
        PAPER,
        "Context loss, projection and decay each help: without one of them, CPT is worse.",
        (TRAINED, *_PARTS),
        all_hold(*(Expect(TRAINED, part) for part in _PARTS)),
        bars((TRAINED, *_PARTS), "CPT: context loss, projection and decay"),
    ),
)
