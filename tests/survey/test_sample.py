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
    problems = {kind: str(row) for kind, row in examine(case, KINDS).items() if not _is_as_expected(case, kind, row)}
    assert not problems


def _is_as_expected(case: Case, kind: str, row: Row) -> bool:
    """Whatever refuses a prompt before the text refuses slots in it."""
    key = f"{case}: {kind}"
    expected = REFUSED.get(key) or (REFUSED.get(f"{case}: prompt") if kind == "slots" else None)
    if expected is not None:
        return row.verdict == "refused" and expected in row.refusal
    return row.verdict == "right"
