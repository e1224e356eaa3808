"""On every architecture of the sample each kind of prompt is right, or refused at attach for the known reason."""

from __future__ import annotations

import pytest

from benchmarks.survey.case import Case, Row
from benchmarks.survey.examine import examine
from tests.survey.sample import REFUSED, SAMPLE

KINDS = ("prompt", "prefix", "adapter", "slots")
"""Slots at anchors enter as slots after the first token do; `make survey` tries both."""


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_each_kind_of_prompt_is_right_or_refused(case: Case) -> None:
    problems = {}
    for kind, row in examine(case, KINDS).items():
        expected = REFUSED.get(f"{case}: {'prompt' if kind == 'slots' else kind}")
        if not _is_as_expected(row, expected):
            problems[kind] = f"{row} (expected: {'right' if expected is None else f'refused, {expected}'})"
    assert not problems


def _is_as_expected(row: Row, expected: str | None) -> bool:
    if expected is None:
        return row.verdict == "right"
    return row.verdict == "refused" and expected in row.refusal
