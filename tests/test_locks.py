"""The locks agree with the pins, and every file that CI installs has a hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^ ;\\\n]+)", re.MULTILINE)
NOT_LOCKED = {"torch"}
"""torch's file depends on the machine."""
OF_RAY = {"jsonschema", "jsonschema-specifications", "msgpack", "ray", "referencing", "rpds-py", "tensorboardx"}
"""What only `make test-extras` installs."""


def _pins(file: Path) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in _PIN.findall(file.read_text())}


PINNED = _pins(ROOT / "constraints.txt")
LOCKED = {name: version for file in LOCKS if file.stem != "release" for name, version in _pins(file).items()}


def test_there_are_locks_for_what_make_installs() -> None:
    names = {file.stem for file in LOCKS}
    assert names == {"build", "fuzz", "integrations", "release", "test"}
    assert names == set(re.findall(r"-r locks/(\w+)\.txt", (ROOT / "Makefile").read_text()))


def test_every_pinned_package_is_locked_at_its_version() -> None:
    """After a change to constraints.txt, run `make lock`."""
    assert {name: LOCKED.get(name) for name in PINNED if name not in NOT_LOCKED | OF_RAY} == {
        name: version for name, version in PINNED.items() if name not in NOT_LOCKED | OF_RAY
    }


def test_other_locked_packages_are_for_other_systems() -> None:
    assert set(LOCKED) - set(PINNED) <= {"httpx2-jsfetch", "tzdata"}


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_every_locked_package_has_a_hash(file: Path) -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", file.read_text().partition("\n")[2])
    assert blocks
    assert all(_PIN.match(block) and re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_every_direct_requirement_is_locked() -> None:
    """After a change to pyproject.toml, run `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *extras["test"],
        *extras["quality"],
        *extras["demo"],
        *extras["integrations"],
        *extras["docs"],
        *extras["fuzz"],
    ]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].replace("_", "-").lower() for line in lines} - {"softhooks"}
    assert names - set(LOCKED) == NOT_LOCKED
