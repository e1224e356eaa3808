"""Cartridges: a manual in the context, against a trained cartridge that replaces it.

The document is the task's. The option `in_context` is not one of `Cartridge`: the runner scores the bare model, with the
document in the context if it is True, and without if it is False. A run with 0 steps is scored without training: the keys and
values of the document's first tokens. The others are trained by self-distillation, with loss on the answers' tokens, on questions
about the document in other words than those of the test.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality.findings.framework import Arm, Expect, Finding, Verdict, all_hold, arm, bars
from benchmarks.quality.findings.settings import STEPS
from benchmarks.quality.models import SMOLLM2
from benchmarks.quality.records import Record, Store

PAPER = "Eyuboglu et al. 2025 (Cartridges), arXiv:2506.06266"
ALL_ROWS = 100
"""More shots than the manual has rows."""


def _arm(label: str, steps: int = STEPS, **options: Any) -> Arm:
    return arm(label, "cartridge", SMOLLM2, shots=ALL_ROWS, steps=steps, task="manual", **options)


_DOCUMENT = _arm("document in the context", steps=0, in_context=True)
_NOTHING = _arm("no document", steps=0, in_context=False)
_UNTRAINED = _arm("first 128 tokens of the document", steps=0, num_virtual_tokens=128)
_SMALL = _arm("cartridge of 32 tokens", num_virtual_tokens=32)
_LARGE = _arm("cartridge of 128 tokens", num_virtual_tokens=128)
_ARMS = (_DOCUMENT, _NOTHING, _UNTRAINED, _SMALL, _LARGE)


def _judge(store: Store) -> Verdict:
    """Compare scores, and add the tokens and seconds to the sentence."""
    verdict = all_hold(Expect(_LARGE, _DOCUMENT, "not worse"), Expect(_LARGE, _UNTRAINED))(store)
    document, cartridge = _DOCUMENT.records(store), _LARGE.records(store)
    if document is None or cartridge is None:
        return verdict
    tokens = np.mean([record.context_tokens for record in document])
    sentence = f"{verdict.sentence} The document has {tokens:.0f} tokens, the cartridge 128."
    seconds = _scoring_seconds(document), _scoring_seconds(cartridge)
    if None not in seconds:
        sentence += f" All answers took {seconds[0]:.1f} s with the document and {seconds[1]:.1f} s with the cartridge."
    sentence += f" Training took {np.mean([record.seconds for record in cartridge]):.0f} s."
    return Verdict(verdict.judgment, sentence)


def _scoring_seconds(records: list[Record]) -> float | None:
    """Return the mean seconds for scoring all rows, or None if a record lacks them."""
    found = [record.extra["scoring_seconds"] for record in records if "scoring_seconds" in record.extra]
    return float(np.mean(found)) if len(found) == len(records) else None


FINDINGS = (
    Finding(
        "cartridge",
        PAPER,
        "A trained cartridge answers questions about a manual as well as the manual in the context, and better than the manual "
        "cut to the cartridge's length.",
        _ARMS,
        _judge,
        bars(_ARMS, "Cartridges: a manual of 3,000 tokens"),
    ),
)
