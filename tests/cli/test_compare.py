"""`softhooks compare`: settings, base models and rows of two saved prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import on_disk
import pytest
import torch
import zoo
from safetensors.torch import load_file
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.cli import app
from softhooks.formats.softhooks_files import TENSORS

P = 4
runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def run(*arguments: object) -> str:
    result = runner.invoke(app.app, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(run(*arguments, "--json")))


def test_rows_are_compared_in_their_places_and_with_all_others(tmp_path: Path) -> None:
    model = zoo.build("llama")
    one = on_disk.saved(tmp_path / "one", model, PromptTuning(P))
    with softhooks.attach(model, PromptTuning(P, placement="after_first")) as prompt, torch.no_grad():
        rows = load_file(one / TENSORS)["prompt.embeddings"].roll(1, 0)
        next(prompt.encoder.parameters()).copy_(rows * 2)
        prompt.save_pretrained(tmp_path / "two")
    found = told(one, tmp_path / "two")
    before, after = rows.roll(-1, 0), rows * 2
    [tensor] = found["tensors"]
    assert [row["cosine"] for row in tensor["rows"]] == pytest.approx(
        torch.cosine_similarity(before, after).tolist(), abs=1e-5
    )
    assert [row["distance"] for row in tensor["rows"]] == pytest.approx((after - before).norm(dim=1).tolist(), rel=1e-5)
    assert [row["most_similar"]["slot"] for row in tensor["rows"]] == [1, 2, 3, 0]
    assert [row["most_similar"]["cosine"] for row in tensor["rows"]] == pytest.approx([1.0] * P, abs=1e-5)
    assert [row["norms"][1] for row in tensor["rows"]] == pytest.approx(after.norm(dim=1).tolist())
    assert found["base"] == {"same": True, "finding": "the same base model"}
    assert {"name": "placement", "a": "front", "b": "after_first"} in found["settings"]
    text = run(one, tmp_path / "two")
    assert "base models: the same base model" in text
    for row in tensor["rows"]:
        assert f"{row['most_similar']['slot']} (1.00)" in text


def test_equal_prompts_are_equal(tmp_path: Path) -> None:
    folder = on_disk.saved(tmp_path, zoo.build("bert", "sequence"), PrefixTuning(P))
    text = run(folder, folder)
    for phrase in ("settings: equal", "text: equal", "head classifier: equal", "the same base model"):
        assert phrase in text


def test_other_base_models_methods_and_lengths_are_told(tmp_path: Path) -> None:
    one = on_disk.saved(tmp_path / "one", zoo.build("llama"), PromptTuning(P))
    other = on_disk.saved(tmp_path / "two", zoo.build("llama", seed=5), PromptTuning(P + 2))
    found = told(one, other)
    assert found["base"] == {"same": False, "finding": "different base models"}
    assert {"name": "num_virtual_tokens", "a": P, "b": P + 2} in found["settings"]
    assert len(found["tensors"][0]["rows"]) == P
    assert f"A has {P} rows, B has {P + 2}" in run(one, other)
    prefix = on_disk.saved(tmp_path / "three", zoo.build("llama"), PrefixTuning(P))
    text = run(one, prefix)
    assert "embeddings: not comparable, the shapes are 4 x 32 and none" in text
    assert "text: not comparable, the shapes are none and" in text


def test_heads_are_compared(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    one = on_disk.saved(tmp_path / "one", model, PromptTuning(P))
    with softhooks.load(model, one, trainable=True) as prompt, torch.no_grad():
        next(prompt.heads.parameters()).add_(0.25)
        prompt.save_pretrained(tmp_path / "two")
    assert "head classifier: differs by at most 0.25" in run(one, tmp_path / "two")


def test_files_of_peft_do_not_identify_their_base(tmp_path: Path) -> None:
    model = zoo.build("llama")
    one = on_disk.saved(tmp_path / "one", model, PromptTuning(P))
    with softhooks.load(model, one) as prompt:
        prompt.save_pretrained(tmp_path / "peft", as_peft=True)
    found = told(one, tmp_path / "peft")
    assert found["base"]["same"] is None
    assert "no fingerprint" in found["base"]["finding"]
    assert found["tensors"][0]["equal"] is True


def test_a_place_without_a_prompt_is_exit_code_2(tmp_path: Path) -> None:
    result = runner.invoke(app.app, ["compare", str(tmp_path), str(tmp_path)])
    assert result.exit_code == 2
    assert "there is no saved prompt at this path" in result.stderr
