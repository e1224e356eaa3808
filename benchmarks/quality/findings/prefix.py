"""Prefix tuning with few rows: the MLP, initial values from words, and a prefix in every layer.

For `init="text"`, the runner passes the task's instruction as `init_text`.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import FEW_SHOTS, LENGTH
from benchmarks.quality.models import SMOLLM2

PAPER = "Li & Liang 2021, arXiv:2101.00190"


def _prefix(init: str, projection: bool) -> Arm:
    return arm(
        f"{'words' if init == 'text' else 'random'}, {'with' if projection else 'without'} MLP",
        "prefix_tuning",
        SMOLLM2,
        rate="prefix_tuning with MLP" if projection else "prefix_tuning",
        shots=FEW_SHOTS,
        num_virtual_tokens=LENGTH,
        init=init,
        projection=projection,
    )


_WORDS, _WORDS_MLP = _prefix("text", projection=False), _prefix("text", projection=True)
_RANDOM, _RANDOM_MLP = _prefix("random", projection=False), _prefix("random", projection=True)
_EMBEDDINGS = arm(
    "words, embeddings only", "prompt_tuning", SMOLLM2, shots=FEW_SHOTS, num_virtual_tokens=LENGTH, init="text"
)
_PREFIXES = (_WORDS, _WORDS_MLP, _RANDOM, _RANDOM_MLP)

FINDINGS = (
    Finding(
        "prefix_mlp",
        PAPER,
        "A prefix that is computed by an MLP trains better than one whose keys and values are trained directly.",
        _PREFIXES,
        all_hold(Expect(_RANDOM_MLP, _RANDOM), Expect(_WORDS_MLP, _WORDS)),
        bars(_PREFIXES, "Prefix tuning: MLP"),
    ),
    Finding(
        "prefix_init",
        PAPER,
        "With few training rows, a prefix initialized with the keys and values of words is better than a random one.",
        _PREFIXES,
        all_hold(Expect(_WORDS, _RANDOM), Expect(_WORDS_MLP, _RANDOM_MLP)),
        bars(_PREFIXES, "Prefix tuning: initial values"),
    ),
    Finding(
        "prefix_layers",
        PAPER,
        "Training only the embeddings is worse than training a prefix in all layers.",
        (_WORDS, _WORDS_MLP, _EMBEDDINGS),
        all_hold(Expect(_WORDS, _EMBEDDINGS), Expect(_WORDS_MLP, _EMBEDDINGS)),
        bars((_WORDS, _WORDS_MLP, _EMBEDDINGS), "Prefix tuning: all layers and embeddings only"),
    ),
)
