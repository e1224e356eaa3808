"""The checks. To add one, write it in a file of this folder and name it in the modalities to which it applies."""

from __future__ import annotations

from benchmarks.survey.check import Check
from benchmarks.survey.checks import base, by_hand, columns, decoding, outputs, training, words

CHECKS: dict[str, Check] = {
    check.name: check
    for module in (base, outputs, training, columns, by_hand, decoding, words)
    for check in module.CHECKS
}
"""Checks by name."""
