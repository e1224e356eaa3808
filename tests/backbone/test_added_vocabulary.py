"""Vocabularies that a script has resized: what is detected, and the warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import zoo

import softhooks
from softhooks import PromptMismatchError, PromptTuning
from softhooks.backbone.added_vocabulary import original_vocabulary
from softhooks.backbone.examine import examine

ARCHS = ["llama", "qwen3", "gemma3", "gpt2", "bert", "t5"]


def told(model: Any) -> int | None:
    return original_vocabulary(model, examine(model))


def loaded(arch: str, folder: Path) -> Any:
    head = {"bert": "masked", "t5": "seq2seq"}.get(arch, "causal")
    zoo.build(arch, head).save_pretrained(folder)
    return getattr(tf, zoo.HEADS[head][0]).from_pretrained(folder)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_beyond_the_checkpoint_are_told(arch: str, tmp_path: Path) -> None:
    model = loaded(arch, tmp_path)
    assert told(model) is None
    model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    assert told(model) == zoo.VOCABULARY
    model.save_pretrained(tmp_path / "resized")
    again = type(model).from_pretrained(tmp_path / "resized")
    assert told(again) is None, "its rows are in its checkpoint"


def test_rows_beyond_the_module_inside_are_told() -> None:
    model = zoo.build("llama")
    assert told(model) is None
    model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    assert told(model) == zoo.VOCABULARY


def test_a_smaller_vocabulary_is_not_said_to_be_added() -> None:
    model = zoo.build("llama")
    model.resize_token_embeddings(zoo.VOCABULARY - 10)
    assert told(model) is None


@pytest.mark.parametrize("spoiled", ["", "[]", "{", '{"vocab_size": "many"}', '{"text_config": 3}'])
def test_a_config_that_cannot_be_read_tells_nothing(spoiled: str, tmp_path: Path) -> None:
    model = loaded("gpt2", tmp_path)
    model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    (tmp_path / "config.json").write_text(spoiled)
    assert told(model) is None


def test_attach_says_how_many_rows_were_added(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    with pytest.warns(UserWarning, match=r"3 embedding rows .*frozen.*not saved.*train_added_tokens") as said:
        prompt = softhooks.attach(model, PromptTuning(4))
    assert said[0].filename == __file__
    prompt.save_pretrained(tmp_path)
    fresh = zoo.build("llama")
    fresh.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    with pytest.warns(UserWarning, match="3 embedding rows"):
        softhooks.load(fresh, tmp_path)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_a_base_with_a_smaller_vocabulary_is_refused(arch: str, tmp_path: Path) -> None:
    head = {"bert": "masked", "t5": "seq2seq"}.get(arch, "causal")
    softhooks.attach(zoo.build(arch, head), PromptTuning(4, init="random")).save_pretrained(tmp_path)
    small = zoo.build(arch, head, vocab_size=70)
    with pytest.raises(PromptMismatchError, match="vocabulary") as error:
        softhooks.load(small, tmp_path)
    assert "96" in str(error.value)
    assert "70" in str(error.value)
    assert not hasattr(small, "soft_prompt")


@pytest.mark.filterwarnings("ignore:.*embedding rows")
def test_saving_says_once_what_the_file_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4)).save_pretrained(tmp_path)
    model = zoo.build("llama")
    model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
    lacking = softhooks.attach(model, PromptTuning(4))
    whole = softhooks.attach(model, PromptTuning(4), "whole", train_added_tokens=True)
    assert "the file of" not in caplog.text
    for prompt in (whole, lacking, lacking):
        prompt.save_pretrained(tmp_path)
    said = [record.getMessage() for record in caplog.records if "not in the file" in record.getMessage()]
    assert len(said) == 1
    assert "'default'" in said[0]
