"""A user's project that uses the public names type-checks in strict mode: the wheel has `py.typed`, and full annotations."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = ROOT / "tests" / "typed_project"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with softhooks as a wheel installs it; type checkers do not find editable installs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "softhooks", site / "softhooks", ignore=without_caches)
    shutil.copytree(ROOT / "integrations", site / "softhooks" / "integrations", ignore=without_caches)
    others = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    (site / "others.pth").write_text("\n".join(dict.fromkeys(others)) + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return shutil.copytree(PROJECT, tmp_path / "project")


def _mypy(project: Path, python: Path) -> str:
    """What mypy prints. The configuration and the cache are those of `make types`, which has already examined torch."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
    ]
    command += ["--python-executable", python, "--no-pretty", project / "user.py"]
    return subprocess.run([*map(str, command)], cwd=project, capture_output=True, text=True).stdout


def _misuse(project: Path, file: str) -> None:
    """Write a copy of the project's file with a wrong argument."""
    text = (project / "user.py").read_text()
    assert "num_virtual_tokens=16" in text
    (project / file).write_text(text.replace("num_virtual_tokens=16", "num_virtual_tokens='16'"))


def test_mypy_accepts_the_project_and_finds_a_wrong_argument(project: Path, python: Path) -> None:
    assert _mypy(project, python).startswith("Success: no issues found")
    _misuse(project, "user.py")
    assert 'incompatible type "str"; expected "int"' in _mypy(project, python)


def test_mypy_needs_the_marker(project: Path, python: Path) -> None:
    marker = python.parent.parent.glob("lib/*/site-packages/softhooks/py.typed")
    [found] = marker
    found.rename(found.with_name("marker"))
    try:
        assert "missing library stubs or py.typed marker" in _mypy(project, python)
    finally:
        found.with_name("marker").rename(found)


def test_pyright_accepts_the_project_and_finds_a_wrong_argument(project: Path, python: Path) -> None:
    _misuse(project, "wrong.py")
    settings = {"typeCheckingMode": "strict", "include": ["*.py"]}
    (project / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", str(python)]
    answer = json.loads(subprocess.run(command, cwd=project, capture_output=True, text=True).stdout)
    assert answer["summary"]["filesAnalyzed"] == 2
    [error] = answer["generalDiagnostics"]
    assert Path(error["file"]).name == "wrong.py"
    assert '"Literal[\'16\']" is not assignable to "int"' in error["message"]


def test_the_project_can_be_imported() -> None:
    names = runpy.run_path(str(PROJECT / "user.py"))
    assert callable(names["main"])
