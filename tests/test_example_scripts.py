"""Every script and notebook of examples/ runs to its end on a tiny model and the real data, and says what it did."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
from markdown import ROOT
from transformers import AutoTokenizer
from untouched import remove_all

from softhooks.demo import corpus, tiny_models

EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "accelerate_loop": ((), ["--steps", "4"], "at the end", "soft_prompt.safetensors"),
    "cartridge": (
        (),
        ["--document-tokens", "60", "--tokens", "8", "--questions", "2", "--epochs", "2"],
        "8 virtual tokens instead of 60 tokens",
        "soft_prompt.safetensors",
    ),
    "chat_sft_trl": (("trl",), ["--steps", "2", "--tests", "2"], "answered with the right package", "soft_prompt.json"),
    "cpt": ((), ["--shots", "2", "--steps", "1", "--tests", "2"], "after training", "soft_prompt.safetensors"),
    "dpo_trl": (("trl",), ["--steps", "2", "--tests", "4"], "of the test rows", "soft_prompt.safetensors"),
    "few_shot_p_tuning": ((), ["--steps", "2", "--shots", "2", "--tests", "2"], "on 8 rows", "soft_prompt.safetensors"),
    "serving": ((), ["--steps", "2"], "embeddings for vLLM", "request.json"),
    "text_classification": ((), ["--steps", "2"], "trained parameters", "soft_prompt.safetensors"),
}
"""For each script: the packages that it needs, arguments, words of its last line, and a file that it writes."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny encoder and a tiny decoder, whose vocabulary is that of the data."""
    rows = corpus.read_corpus().rows[::20]
    texts = [*(row.text for row in rows), *corpus.PACKAGES * 50, "Question Answer Text Package user assistant : ? |"]
    folder = tmp_path_factory.mktemp("models")
    encoder = tiny_models.tiny_encoder(texts, folder / "encoder").path
    decoder = tiny_models.tiny_decoder(texts, folder / "decoder").path
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = tokens.CHAT
    tokenizer.save_pretrained(decoder)
    return {"text_classification": encoder} | dict.fromkeys(SCRIPTS.keys() - {"text_classification"}, decoder)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    remove_all()
    torch.set_num_threads(threads)


def test_every_script_is_run_and_short() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in paths] == sorted(SCRIPTS)
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path


def _prepare(name: str, models: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Skip without the script's packages; otherwise go to the folder, and return the arguments."""
    packages, arguments, _, _ = SCRIPTS[name]
    for package in ("datasets", *packages):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    return ["--model", models[name], "--output", "out", *arguments]


def _check(name: str, folder: Path, printed: str) -> None:
    _, _, words, file = SCRIPTS[name]
    assert words in printed.strip().splitlines()[-1]
    assert (folder / "out" / file).is_file()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *_prepare(name, models, tmp_path, monkeypatch)])
    runpy.run_path(script, run_name="__main__")
    _check(name, tmp_path, capsys.readouterr().out)


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_the_notebooks_are_those_of_the_script() -> None:
    made = runpy.run_path(str(ROOT / "docs/site/notebooks.py"))["notebooks"]()
    found = {path.name: path.read_text(encoding="utf-8") for path in (EXAMPLES / "notebooks").glob("*.ipynb")}
    assert found == made, "run `python docs/site/notebooks.py`"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "notebooks").glob("*.ipynb")))
def test_the_notebook_runs(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = _prepare(name, models, tmp_path, monkeypatch)
    cells = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(source.count("parse_args([])") for source in sources) == 1
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        source = source.replace("parse_args([])", f"parse_args({arguments!r})")
        exec(compile(source, f"{name}, cell {number}", "exec"), names)
    _check(name, tmp_path, capsys.readouterr().out)
