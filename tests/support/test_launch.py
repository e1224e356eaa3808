"""Tests that launch processes never hang, and leave none behind."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from launch import SCRIPTS, launch


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", [[], ["orphaned"]], ids=["waiting", "orphaned"])
def test_workers_that_hang_are_killed(tmp_path: Path, how: list[str]) -> None:
    """They ignore SIGTERM, have children of their own, and may have lost their launcher."""
    for patience in (8, 30, 90):  # until they have started, and not much longer
        began = time.monotonic()
        status, output = launch(SCRIPTS / "hang.py", tmp_path, *how, timeout=patience)
        if len(list(tmp_path.glob("hang*.txt"))) == 2:
            break
    assert status != 0
    assert output.endswith(f"killed after {patience} seconds")
    assert patience <= time.monotonic() - began < patience + 30
    workers = [int(pid) for file in tmp_path.glob("hang*.txt") for pid in file.read_text().split()]
    assert len(set(workers)) == 4
    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_alive(pid)]


def test_a_launch_that_fails_says_so(tmp_path: Path) -> None:
    status, output = launch(tmp_path / "nothing.py", timeout=120)
    assert status != 0
    assert "nothing.py" in output
