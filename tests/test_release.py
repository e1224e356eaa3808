"""What a release contains besides code: its license, its citation, its checks and the ways to report problems."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import softhooks

ROOT = Path(__file__).parent.parent
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _audit() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "audit.py"))


def test_the_citation_names_this_version_and_license() -> None:
    """The keys that version 1.2.0 of the Citation File Format requires, and those that change with a release."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    assert all(
        set(author) <= {"name", "family-names", "given-names", "orcid", "website"} for author in cited["authors"]
    )
    assert str(cited["version"]) == softhooks.__version__
    assert cited["license"] == PROJECT["license"]


def test_the_license_is_declared_as_an_expression_with_its_file() -> None:
    """PEP 639."""
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert not [line for line in PROJECT["classifiers"] if line.startswith("License ::")]


@pytest.mark.parametrize("file", sorted(FORMS.glob("[!c]*.yml")), ids=lambda file: file.stem)
def test_issue_forms_are_complete(file: Path) -> None:
    """GitHub shows no form that breaks these rules."""
    form = yaml.safe_load(file.read_text())
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) >= 2
    assert all(part["attributes"]["label"] and part["type"] in ("input", "textarea", "dropdown") for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_vulnerabilities_are_reported_privately() -> None:
    assert "**Report a vulnerability**" in (FORMS / "bug.yml").read_text()
    page = (ROOT / "SECURITY.md").read_text()
    assert "**Report a vulnerability**" in page
    named = re.findall(r"`((?:softhooks|tests|locks|\.dist-info)/[^`]*)`", page)
    assert named
    assert [name for name in named if not name.startswith(".") and not (ROOT / name).exists()] == []


def test_an_audit_names_each_vulnerability_and_takes_nothing_else_for_an_answer() -> None:
    read = _audit()["vulnerabilities"]
    found = {"id": "X-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}
    answer = '{"dependencies": [{"name": "a", "version": "1.0", "vulns": [%s]}]}'
    assert read(answer % "") == []
    assert read(answer % str(found).replace("'", '"')) == ["a 1.0: X-1, fixed in 1.1"]
    skipped = '{"dependencies": [{"name": "a", "skip_reason": "not found"}]}'
    for no_answer in ("", "null", "[]", "{}", '{"dependencies": []}', skipped):
        assert read(no_answer) is None


def test_an_audit_asks_for_every_pinned_package() -> None:
    pins = _audit()["pins"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins((ROOT / "constraints.txt").read_text()) == lines
    assert "pip-audit" in {pin.split("==")[0] for pin in pins((ROOT / "locks" / "release.txt").read_text())}


def test_no_ignored_file_is_tracked() -> None:
    """`git add` in the middle of a rebase can add an environment that a later commit ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout == ""
