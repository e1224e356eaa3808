"""What the methods' papers found, tested on small models."""

from __future__ import annotations

from benchmarks.quality.findings import anchors, cartridge, choices, cpt, deep, length, prefix, transfer, zero_gate
from benchmarks.quality.findings.framework import Finding

FINDINGS: tuple[Finding, ...] = (
    *length.FINDINGS,
    *prefix.FINDINGS,
    *anchors.FINDINGS,
    *deep.FINDINGS,
    *transfer.FINDINGS,
    *cpt.FINDINGS,
    *zero_gate.FINDINGS,
    *cartridge.FINDINGS,
    *choices.FINDINGS,
)
"""All findings, in the order of the report."""
