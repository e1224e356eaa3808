"""Replay the corpus: every input is read, or refused with a `SoftHooksError`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz import corpus_files, mutate, readers


def test_every_reader_has_a_corpus() -> None:
    assert corpus_files.readers() == sorted(readers.READERS)


@pytest.mark.parametrize("name", corpus_files.readers())
def test_no_input_of_the_corpus_fails(name: str) -> None:
    files = [file for reader, file in corpus_files.inputs() if reader == name]
    assert files
    for file in files:
        try:
            readers.try_reader(name, file.read_bytes())
        except Exception as error:
            error.add_note(f"the input is {file}")
            raise


def test_the_corpus_is_small() -> None:
    sizes = [file.stat().st_size for _, file in corpus_files.inputs()]
    assert len(sizes) < 1500
    assert sum(sizes) < 2 * 2**20


@pytest.mark.parametrize("name", ["description", "loaded", "peft"])
def test_seeds_are_read_completely(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness whose seeds are refused at the start would test nothing."""
    read = []
    monkeypatch.setattr(readers, "read", lambda folder, plain=readers.read: read.append(plain(folder)) or read[-1])
    seeds = [file for reader, file in corpus_files.inputs() if reader == name and file.name.startswith("seed-")]
    for file in seeds:
        readers.try_reader(name, file.read_bytes())
    assert len(read) >= len(seeds) > 15


def test_unexpected_errors_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(readers.READERS, "layout", broken)
    with pytest.raises(ZeroDivisionError):
        readers.try_reader("layout", b"{soft:3}")


def test_mutations_are_json_and_differ() -> None:
    text = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    changed = [mutate.mutate_json(text, seed, 10_000) for seed in range(100)]
    assert len({one for one in changed if one is not None}) > 50
    assert all(json.loads(one) is not ... for one in changed if one)
    assert mutate.mutate_json(b"{", 0, 100) is None


def test_no_input_comes_from_this_machine() -> None:
    assert not [file for _, file in corpus_files.inputs() if str(Path.home()).encode() in file.read_bytes()]
