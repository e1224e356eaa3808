"""The table of methods. A new method is one line here, and every property runs over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import zoo

from softhooks import PrefixTuning, PromptTuning
from softhooks.method import Method


@dataclass(frozen=True)
class Entry:
    """One way to use a method.

    Attributes:
        make: builds it for P virtual tokens.
        fits: whether it can enter an architecture with a head.
    """

    name: str
    make: Callable[[int], Method]
    fits: Callable[[zoo.Case], bool] = lambda case: True

    def __str__(self) -> str:
        return self.name


def _has_end(case: zoo.Case) -> bool:
    return case.head != "causal"


TABLE = [
    Entry("prompt", lambda p: PromptTuning(p)),
    Entry("prompt-random", lambda p: PromptTuning(p, init="random")),
    Entry("prompt-after-first", lambda p: PromptTuning(p, placement="after_first")),
    Entry("prompt-end", lambda p: PromptTuning(p, placement="end"), _has_end),
    Entry("prefix", lambda p: PrefixTuning(p)),
    Entry("prefix-random", lambda p: PrefixTuning(p, init="random")),
    Entry("prefix-mlp", lambda p: PrefixTuning(p, projection=True, hidden_size=16, dropout=0.1)),
]
BY_NAME = {entry.name: entry for entry in TABLE}

PAIRS = [(entry, case) for entry in TABLE for case in zoo.CASES if entry.fits(case)]
"""Every method on every architecture with every head."""
