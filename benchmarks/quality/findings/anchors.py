"""P-tuning: virtual tokens next to an anchor inside the text, against virtual tokens in front only.

The anchor is the task's question, such as "\\nPackage:", which is the last part of each row. Two options of the runs are not
options of `PTuning`: `start` and `before_question`. From them, the runner makes
`Layout.insert(start=start, before={question: before_question}, which="last")`, where `question` is the tuple of the question's
token ids, and passes it to `PTuning` as `layout`. A number of 0 leaves the argument out.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.models import SMOLLM2

TOKENS = 12


def _inserted(label: str, start: int) -> Arm:
    return arm(label, "p_tuning", SMOLLM2, start=start, before_question=TOKENS - start)


_FRONT = _inserted("all in front", TOKENS)
_BOTH = _inserted("half in front, half before the question", TOKENS // 2)
_QUESTION = _inserted("all before the question", 0)
_ARMS = (_FRONT, _BOTH, _QUESTION)

FINDINGS = (
    Finding(
        "anchors",
        "Liu et al. 2021 (P-tuning), arXiv:2103.10385",
        "Virtual tokens in front of the text and before an anchor inside it are better than virtual tokens in front only.",
        _ARMS,
        all_hold(Expect(_BOTH, _FRONT)),
        bars(_ARMS, "P-tuning: places of the virtual tokens"),
    ),
)
