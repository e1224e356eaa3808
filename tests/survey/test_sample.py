"""On every architecture of the sample each kind of prompt is right, or refused at attach for the known reason."""

from __future__ import annotations

import pytest

from tests.survey.findings import Case, Finding, examine
from tests.survey.sample import REFUSED, SAMPLE


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_each_kind_of_prompt_is_right_or_refused(case: Case) -> None:
    problems = {}
    for kind, finding in examine(case).items():
        expected = REFUSED.get(f"{case}: {kind}")
        if not _is_as_expected(finding, expected):
            problems[kind] = f"{finding} (expected: {'right' if expected is None else f'refused, {expected}'})"
    assert not problems


def _is_as_expected(finding: Finding, expected: str | None) -> bool:
    if expected is None:
        return not finding.refusal and not finding.wrong
    return expected in finding.refusal
