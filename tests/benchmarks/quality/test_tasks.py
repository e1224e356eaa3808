"""The tasks on small files: parsing, masks, the split by source, determinism; and fetching with a fake apt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.quality import sources
from benchmarks.quality.sources import Package
from benchmarks.quality.task import Row, Task
from benchmarks.quality.tasks import TASKS, docstrings, glosses, sections, synopses
from benchmarks.quality.tasks.glosses import gloss_rows
from benchmarks.quality.tasks.manual import manual
from benchmarks.quality.tasks.rows import balanced, class_names, distinct, whole_names
from benchmarks.quality.tasks.sections import LABELS, section_rows
from benchmarks.quality.tasks.synopses import synopsis_rows

NOUNS = """\
  1 This license has a line with 05 | in it; "not a gloss"
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived to exist
00001930 05 n 01 cat 0 001 @ 00001740 n 0000 | a feline animal that purrs; "the cat sat on the mat"; "a \"cat\""
00002452 04 n 01 run 0 001 @ 00001740 n 0000 | the act of running; a reaction to danger
00002684 08 n 01 skin 0 001 @ 00001740 n 0000 | a covering of the Body
00002685 05 n 01 hide 0 001 @ 00001740 n 0000 | a covering that is ambiguous
00002686 06 n 01 lid 0 001 @ 00001740 n 0000 | A covering that is ambiguous.
"""


def _package(name: str, section: str, synopsis: str, *paragraphs: str, source: str | None = None) -> Package:
    return Package(name, source or name, section, synopsis, paragraphs)


def _write_packages(cache: Path, sources_per_section: int = 60) -> None:
    """Write packages, two of each source; the names of class, package and source are in every text."""
    packages = [
        _package(
            f"{section}pkg{number}{suffix}",
            section,
            f"Tool {number} for {label} of kind {kind}",
            f"A {label} is what {section}pkg{number}{suffix} makes on day {number}, says {section}source{number}.",
            source=f"{section}source{number}",
        )
        for kind, (section, label) in enumerate(LABELS.items())
        for number in range(sources_per_section)
        for suffix in ("", "-data")
    ]
    lines = [json.dumps({"Debian": "SHA-256 1234"}), *(json.dumps(asdict(package)) for package in packages)]
    (cache / sources.PACKAGES).write_text("\n".join(lines) + "\n")


def _write_nouns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"04": "action", "05": "animal", "18": "person", "20": "plant"}
    lines = [
        f"{file}{number:06} {file} n 01 word 0 000 | a common {name} with number {file}{number}"
        for file, name in files.items()
        for number in range(100)
    ]
    content = "\n".join(lines).encode()
    (cache / sources.NOUNS).write_bytes(content)
    monkeypatch.setattr(sources, "NOUNS_SHA256", hashlib.sha256(content).hexdigest())


def _write_library(root: Path) -> None:
    for package in ("email", "http", "xml"):
        (root / package).mkdir()
        for number in range(12):
            functions = [
                f'def f{index}():\n    """Return part {index} of {package} in file {number}-{package[0]}."""\n'
                for index in range(5)
            ]
            (root / package / f"m{number}.py").write_text("\n".join(functions))


@pytest.fixture(params=["docstrings", "sections", "glosses", "synopses"])
def read(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Task]:
    """A function that reads a task from small files."""
    _write_packages(tmp_path)
    _write_nouns(tmp_path, monkeypatch)
    _write_library(tmp_path)
    monkeypatch.setenv("PATH", "")  # nothing can be fetched
    functions = {"docstrings": docstrings, "sections": sections, "glosses": glosses, "synopses": synopses}
    return lambda: functions[request.param](tmp_path)


def test_parts_have_different_sources_and_texts(read: Callable[[], Task]) -> None:
    task = read()
    parts = (task.train, task.development, task.test)
    assert all(parts)
    for field in ("source", "text"):
        values = [{getattr(row, field) for row in part} for part in parts]
        assert len(set.union(*values)) == sum(map(len, values))


def test_rows_are_the_same_each_time(read: Callable[[], Task]) -> None:
    assert read() == read()


def test_no_text_contains_its_class(read: Callable[[], Task]) -> None:
    task = read()
    rows = task.train + task.development + task.test
    if task.generates:
        assert not any(row.answer in row.text for row in rows)
    else:
        assert task.without_class_names()
        assert all("_" in row.text for row in rows)
    assert all(len(row.text.split()) >= 4 for row in rows)


def test_instruction_names_all_classes(read: Callable[[], Task]) -> None:
    task = read()
    assert all(label in task.instruction for label in task.labels)
    assert {row.answer for row in task.train} == set(task.labels) or task.generates or task.name == "glosses"
    assert task.provenance


def test_classes_are_balanced(tmp_path: Path) -> None:
    _write_packages(tmp_path, sources_per_section=300)
    task = sections(tmp_path)
    assert set(Counter(row.answer for row in task.development).values()) == {25}
    assert set(Counter(row.answer for row in task.test).values()) == {40}


def test_small_classes_are_made_up_for() -> None:
    rows = [Row(f"{label} {i}", label, "") for label, size in {"a": 50, "b": 3, "c": 50}.items() for i in range(size)]
    assert Counter(row.answer for row in balanced(rows, "abc", 30, 0)) == {"a": 13, "b": 3, "c": 14}
    assert len(balanced(rows, "abc", 1000, 0)) == len(rows)
    assert len(set(balanced(rows, (), 30, 0))) == 30


def test_ambiguous_and_repeated_texts_are_dropped() -> None:
    texts = [("one two three four", "a"), ("One two, three four.", "a"), ("five six seven eight", "a")]
    rows = [Row(text, answer, str(i)) for i, (text, answer) in enumerate([*texts, ("five six seven _ eight", "b")])]
    assert [row.source for row in distinct(rows)] == ["0"]
    assert distinct([Row("only three words", "a", "0")]) == []


def test_masks() -> None:
    assert class_names(["mail"], "net").sub("_", "Email, a mailbox and the NET, not a planet") == (
        "_, a _ and the _, not a planet"
    )
    assert whole_names("vi", "vi-c++").sub("_", "vi-c++, VI, and vim; libvi") == "_, _, and vim; libvi"


def test_sections_keep_one_package_of_each_source() -> None:
    packages = [
        _package("chess-data", "games", "data of chess", "Pictures that chess needs.", source="chess"),
        _package("chess", "games", "play chess", "A game for two people.", source="chess"),
        _package("libchess", "libs", "library", "Functions for programs that play.", source="chess"),
    ]
    assert section_rows(packages) == [Row("play _. A _ for two people.", "games", "chess")]


def test_synopses_must_not_be_in_the_description() -> None:
    packages = [
        _package("a", "games", "Tool for board games", "This is a tool for board-games and more."),
        _package("b", "games", "Rules of many games", "First paragraph of b.", "Here are rules of many games."),
        _package("c", "games", "Draw pretty trees", "It plots what grows in the forest."),
        _package("d", "net", "draw pretty trees.", "Another text with the same synopsis."),
        _package("e", "libs", "A library for all", "Functions that programs can use."),
        _package("f", "utils", "Convert", "Make other files from some files."),
    ]
    assert synopsis_rows(packages) == [Row("It plots what grows in the forest.", "Draw pretty trees", "c")]


def test_glosses_are_definitions_without_examples() -> None:
    assert gloss_rows(NOUNS) == [
        Row("a feline _ that purrs", "animal", "00001930"),
        Row("the _ of running; a _ to danger", "action", "00002452"),
        Row("a covering of the _", "body", "00002684"),
    ]


def test_a_task_reads_only_its_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sources, "WORDNET_DIRECTORY", tmp_path)
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.delenv("WNHOME", raising=False)
    assert len(TASKS["docstrings"]().test) > 100
    for name in ("sections", "synopses"):
        with pytest.raises(sources.SoftHooksError, match=r"(?s)has no apt-get\..*copy .*debian-packages"):
            TASKS[name]()
    with pytest.raises(sources.SoftHooksError, match=r"(?s)WordNet 3.0 cannot be fetched.*WNSEARCHDIR"):
        TASKS["glosses"]()


def test_the_manual_has_a_row_for_each_command() -> None:
    task = manual()
    rows = {row.text: row.answer for row in task.test}
    assert len(rows) >= 30
    assert rows["where"] == "Print a stack trace, with the most recent frame at the bottom."
    assert rows["continue"].startswith("Continue execution, only stop")
    assert all(" ".join(task.document.split()).count(answer) for answer in rows.values())
    assert {row.text for row in task.train} == set(rows)
