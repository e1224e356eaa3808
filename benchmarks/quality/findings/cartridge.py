"""Cartridges: a document in the context, against a trained cartridge that replaces it.

The document is the task's instruction with labeled rows: `DecoderInputs.context(task.sample(document_shots, seed),
limit=document_tokens)`. Three options of the runs are not those of `Cartridge`:
- `document_shots` and `document_tokens`: see above; the runner passes the ids as `document`.
- `in_context`: if True, the runner scores the bare model with the whole document in the context, and records its length in
  `context_tokens`.
A run with 0 steps is scored without training: the keys and values of the document's first tokens. The others are trained by
self-distillation on `task.sample(shots, seed + 1000)`, with loss on the answers' tokens. Every run records the seconds that it
took to score all rows in `extra["scoring_seconds"]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality.findings.framework import Arm, Expect, Finding, Verdict, all_hold, arm, bars
from benchmarks.quality.findings.settings import FEW_SHOTS, STEPS
from benchmarks.quality.models import SMOLLM2
from benchmarks.quality.records import Record, Store

PAPER = "Eyuboglu et al. 2025 (Cartridges), arXiv:2506.06266"
DOCUMENT_TOKENS = 1500


def _arm(label: str, steps: int = STEPS, **options: Any) -> Arm:
    return arm(
        label,
        "cartridge",
        SMOLLM2,
        steps=steps,
        document_shots=FEW_SHOTS,
        document_tokens=DOCUMENT_TOKENS,
        **options,
    )


_DOCUMENT = _arm("document in the context", steps=0, in_context=True)
_UNTRAINED = _arm("first 128 tokens of the document", steps=0, num_virtual_tokens=128)
_SMALL = _arm("cartridge of 32 tokens", num_virtual_tokens=32)
_LARGE = _arm("cartridge of 128 tokens", num_virtual_tokens=128)
_ARMS = (_DOCUMENT, _UNTRAINED, _SMALL, _LARGE)


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
        sentence += (
            f" Scoring all rows took {seconds[0]:.1f} s with the document and {seconds[1]:.1f} s with the cartridge."
        )
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
        "A trained cartridge is as good as the whole document in the context, and better than the document cut to the "
        "cartridge's length.",
        _ARMS,
        _judge,
        bars(_ARMS, "Cartridges"),
    ),
)
