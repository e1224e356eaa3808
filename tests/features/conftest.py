"""Every test starts without prompts that another test has left attached."""

from __future__ import annotations

import pytest
from untouched import remove_all


@pytest.fixture(autouse=True)
def _clean() -> None:
    remove_all()
