"""The documentation: its Python blocks run, its commands, links and modules exist, and the README is short."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import documented
import markdown
import pytest
import torch
import typer.main
from markdown import ROOT, Block
from untouched import remove_all

from softhooks.cli import app

NOT_RUN = "not run: "
RUN_ELSEWHERE = {
    "CONTRIBUTING.md": "tests/test_contributing.py",
    "docs/frameworks.md": "tests/integrations/test_frameworks_page.py",
}


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int | None = None) -> list[str]:
    """Run a page's Python blocks in order, or the first few; return what each has printed."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    printed = []
    for block in markdown.blocks(page, "python")[:count]:
        if block.comment.startswith(NOT_RUN):
            continue
        torch.manual_seed(0)
        names |= documented.common() | documented.PAGES[page]()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block.code, str(block), "exec"), names)
        printed.append(out.getvalue())
        remove_all()
    return printed


@pytest.mark.parametrize("page", documented.PAGES)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in documented.PACKAGES.get(page, ()):
        pytest.importorskip(package)
    run(page, tmp_path, monkeypatch)


def test_every_page_with_python_is_run() -> None:
    pages = {page for page in markdown.PAGES if markdown.blocks(page, "python")}
    assert pages == {*documented.PAGES, *RUN_ELSEWHERE}
    assert all((ROOT / path).is_file() for path in RUN_ELSEWHERE.values())


def test_a_block_that_is_not_run_says_why() -> None:
    for page in markdown.PAGES:
        for block in markdown.blocks(page):
            assert not block.comment or re.match(NOT_RUN + r"\w+ \w+", block.comment), str(block)


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("README.md", tmp_path, monkeypatch, count=1)[0].splitlines()
    (shown,) = (block.code.splitlines() for block in markdown.blocks("README.md", "text"))
    number = re.compile(r"\d[\d,]*\.?\d*")
    assert [number.sub("#", line) for line in printed] == [number.sub("#", line) for line in shown]
    for ours, theirs in zip(printed, shown, strict=True):
        pairs = zip(number.findall(ours), number.findall(theirs), strict=True)
        for one, other in pairs:  # losses differ a little between machines
            assert float(one.replace(",", "")) == pytest.approx(float(other.replace(",", "")), abs=0.1)


def test_the_readme_is_short_and_begins_with_an_example() -> None:
    assert markdown.words("README.md") <= 950
    first = markdown.blocks("README.md")[:3]
    assert [block.language for block in first] == ["sh", "python", "text"]
    assert first[2].line < 40


# --- commands, links, modules -----------------------------------------------------------------------------------------


def _shell_lines() -> list[tuple[Block, list[str]]]:
    lines = [
        (block, shlex.split(line, comments=True))
        for page in markdown.PAGES
        for block in markdown.blocks(page, "sh")
        for line in block.code.splitlines()
    ]
    return [(block, words) for block, words in lines if words]


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    inline = re.findall(r"`make ([a-z-]+)", "".join(map(markdown.text_of, markdown.PAGES)))
    named = {*inline, *(words[1] for _, words in _shell_lines() if words[0] == "make")}
    assert {"demo", "test"} <= named <= targets


def test_every_command_of_softhooks_has_its_options() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    parts = {name: [command, *getattr(command, "commands", {}).values()] for name, command in commands.items()}
    options = {name: {flag for one in own for part in one.params for flag in part.opts} for name, own in parts.items()}
    seen = set()
    for block, words in _shell_lines():
        if words[0] != "softhooks":
            continue
        seen.add(words[1])
        assert words[1] in options, str(block)
        if words[1] != "run":  # the method has a say in its options; tests/cli/test_run.py tries them
            assert {word for word in words if word.startswith("--")} <= options[words[1]], str(block)
    assert seen == set(options)


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    for page in (*markdown.PAGES, "CHANGELOG.md", "benchmarks/README.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", markdown.text_of(page)):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_module_and_file_that_is_named_exists() -> None:
    for page in markdown.PAGES:
        text = markdown.text_of(page)
        for path in re.findall(r"`((?:softhooks|integrations|tests|benchmarks|docs)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
        for name in re.findall(r"softhooks\.integrations\.(\w+)", text):
            assert importlib.util.find_spec(f"softhooks.integrations.{name}"), f"{page}: {name}"


def test_what_a_page_names_together_with_its_file_is_defined_there() -> None:
    named = re.findall(
        r"`(\w+)`\s+\(`((?:softhooks|tests)/[\w/]+\.py)`\)", "".join(map(markdown.text_of, markdown.PAGES))
    )
    assert len(named) >= 3
    for name, path in named:
        assert re.search(rf"^(class|def) {name}\b|^{name}\b.* = ", (ROOT / path).read_text(encoding="utf-8"), re.M), (
            name
        )


def test_every_page_is_in_the_index() -> None:
    index = markdown.text_of("docs/README.md")
    pages = [page.removeprefix("docs/") for page in markdown.PAGES if page.startswith("docs/") and "README" not in page]
    assert not [page for page in pages if f"({page})" not in index]


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_every_refusal_of_the_sample_of_models_is_in_the_table_of_models() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.survey.sample import REFUSED

    kinds = {"prompt": "every prompt", "prefix": "key-value prefixes", "adapter": "gated branches", "slots": "slots"}
    rows = [line.split(" | ") for line in markdown.text_of("docs/models.md").splitlines() if line.startswith("| ")]
    named = {
        kind: " ".join(row[1] for row in rows if len(row) > 1 and words in row[0]) for kind, words in kinds.items()
    }
    for case, kind in (key.split(": ") for key in REFUSED):
        assert f"`{case.split('-')[0]}`" in named[kind] + named["prompt"], f"{case}: {kind}"
