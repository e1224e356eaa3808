"""The documentation site builds without a warning, its drawings are those of the script, and its pages have their parts."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import markdown
import pytest
from markdown import ROOT

import softhooks
from softhooks import errors, methods

METHOD_PAGES = sorted(path.stem for path in (ROOT / "docs/methods").glob("*.md"))
SECTIONS = ["Idea", "Equation", "Code", "Options", "Learning rate", "Pitfalls"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml", "sphinx_copybutton"):
        pytest.importorskip(package)
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html"]
    folders = ["-c", ROOT / "docs/site", "-d", tmp_path / "doctrees", ROOT, tmp_path / "site"]
    told = subprocess.run([*build, *folders], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "site/index.html").is_file()
    page = (tmp_path / "site/docs/methods/prefix-tuning.html").read_text(encoding="utf-8")
    assert "<math" in page
    assert "https://cdn" not in page


def test_the_drawings_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
    specification = importlib.util.spec_from_file_location("draw", ROOT / "docs/site/draw.py")
    assert specification is not None
    assert specification.loader is not None
    draw = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(draw)
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/images").glob("*.svg")}
    assert found == draw.drawings(), "run `python docs/site/draw.py`"


def test_every_drawing_is_shown_with_a_description() -> None:
    shown = {
        name: text
        for page in markdown.PAGES
        for text, name in re.findall(r"!\[([^\]]*)\]\((?:\.\./)?images/([\w.-]+)\)", markdown.text_of(page))
    }
    assert set(shown) == {path.name for path in (ROOT / "docs/images").glob("*.svg")}
    assert all(len(text.split()) >= 4 for text in shown.values())


# --- the pages of the methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD_PAGES)
def test_a_method_page_has_its_sections_and_a_place_for_measurements(name: str) -> None:
    text = markdown.text_of(f"docs/methods/{name}.md")
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [title for title in found if title != "Measured"] == SECTIONS
    assert len(re.findall(r"^<!-- measured: (\w+) -->$", text, re.MULTILINE)) == 1
    assert f"images/method-{name}.svg" in text


def test_every_method_has_a_page_with_its_options() -> None:
    classes = {
        re.findall(r"`softhooks\.(\w+)", markdown.text_of(f"docs/methods/{name}.md"))[0]: name for name in METHOD_PAGES
    }
    for method in methods.METHODS.values():
        if method.__name__ not in softhooks.__all__:
            continue  # the example of CONTRIBUTING.md, while its test runs
        page = f"docs/methods/{classes.get(method.__name__, 'spot')}.md"
        if method is softhooks.PromptTuning:
            page = "docs/methods/prompt-tuning.md"
        assert f"<!-- measured: {method.kind} -->" in markdown.text_of(page), method
        fields = {field.name: field.default for field in dataclasses.fields(method)}
        rows = _options(page)
        assert {"num_virtual_tokens"} & {name for names, _ in rows for name in names} or len(rows) >= 3
        for names, defaults in rows:
            assert set(names) <= set(fields), (page, names)
            for option, default in zip(names, defaults, strict=False):
                assert fields[option] == default, (page, option)


def _options(page: str) -> list[tuple[list[str], list[Any]]]:
    """The names and the defaults in each row of a page's table of options."""
    table = markdown.text_of(page).split("## Options")[1].split("## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [
        (re.findall(r"`(\w+)`", row[0]), [ast.literal_eval(value) for value in re.findall(r"`([^`]+)`", row[1])])
        for row in rows
    ]


def test_every_public_name_and_integration_is_in_the_reference() -> None:
    named = [
        name
        for page in markdown.PAGES
        if page.startswith("docs/reference/")
        for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", markdown.text_of(page), re.MULTILINE)
    ]
    assert sorted(name.split(".")[-1] for name in named if ".integrations." not in name) == softhooks.__all__
    modules = {path.stem for path in (ROOT / "integrations").glob("[a-z]*.py")}
    assert {name.split(".")[-1] for name in named if ".integrations." in name} == modules


# --- the page of the errors -------------------------------------------------------------------------------------------


def _exceptions() -> list[type[Exception]]:
    return [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.SoftHooksError) and value is not errors.SoftHooksError
    ]


def test_the_page_of_errors_has_every_exception_under_its_base_and_with_its_docstring() -> None:
    text = markdown.text_of("docs/errors.md")
    sections = dict(re.findall(r"^## (\w+)\n\n(.+)$", text, re.MULTILINE))
    assert sections == {error.__name__: inspect.getdoc(error) for error in _exceptions()}
    (tree,) = (block.code for block in markdown.blocks("docs/errors.md", "text"))
    bases: dict[str, str] = {}
    above = [""] * 3
    for line in tree.splitlines():
        mark, name = re.findall(r"^([│├└─ ]*)(\w+)", line)[0]
        depth = len(mark) // 4
        above[depth] = name
        bases[name] = above[depth - 1] if depth else "Exception"
    assert bases == {error.__name__: error.__bases__[0].__name__ for error in (errors.SoftHooksError, *_exceptions())}


def test_every_quoted_message_exists() -> None:
    quoted = re.findall(r'^\| "(.+?)" \|', markdown.text_of("docs/errors.md"), re.MULTILINE)
    assert len(quoted) >= 25
    sources = [path for name in ("softhooks", "integrations") for path in (ROOT / name).rglob("*.py")]
    messages = "\n".join(_strings(path) for path in sources)
    assert not [text for text in quoted if text not in messages]


def _strings(path: Path) -> str:
    """The strings of a module, with implicit concatenations joined and the values of f-strings left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return "\n".join(found)
