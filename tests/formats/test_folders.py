"""A folder without a prompt of its own: the error names what is inside and the line that loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from safetensors.torch import load_file, save_file

import softhooks
from softhooks import CheckpointError, PrefixTuning, PromptTuning, PTuning


def test_the_checkpoints_inside_an_output_dir_are_named(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer, callback = training.prompted(
        tmp_path, model, "causal", PromptTuning(4), max_steps=12, save_strategy="steps", save_steps=4
    )
    trainer.train()
    fresh = zoo.build("llama")
    with pytest.raises(CheckpointError) as error:
        softhooks.load(fresh, tmp_path)
    said = str(error.value)
    assert "checkpoint-4, checkpoint-8, checkpoint-12" in said, "by step, not by letters"
    assert "best" not in said, "the Trainer was told no metric"
    line = f"softhooks.load(model, {str(tmp_path / 'checkpoint-12')!r})"
    assert line in said
    loaded = eval(line, {"softhooks": softhooks, "model": fresh})
    assert callback.soft_prompt is not None
    assert torch.equal(loaded.embeddings(), callback.soft_prompt.embeddings())


def test_the_best_checkpoint_is_named(tmp_path: Path) -> None:
    trainer, _ = training.prompted(
        tmp_path, zoo.build("llama"), "causal", PromptTuning(4), max_steps=3, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    assert best == "checkpoint-1", "the loss falls, and the highest is asked for"
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)
    with pytest.raises(CheckpointError) as error:
        softhooks.load(zoo.build("llama"), moved)
    said = str(error.value)
    assert f"softhooks.load(model, {str(moved / best)!r})` (the best)" in said, "also where the folder has moved"
    assert f"softhooks.load(model, {str(moved / 'checkpoint-3')!r})` (the last)" in said


@pytest.mark.parametrize(
    "told", [[], 3, "\0", {"best_model_checkpoint": 3}, {"best_model_checkpoint": "/x/checkpoint-9"}]
)
def test_a_record_of_the_trainer_is_not_trusted(told: Any, tmp_path: Path) -> None:
    softhooks.attach(zoo.build("llama"), PromptTuning(4)).save_pretrained(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="checkpoint-5") as error:
        softhooks.load(zoo.build("llama"), tmp_path)
    assert "(the best)" not in str(error.value)


def test_prompts_in_folders_of_any_name_are_named(tmp_path: Path) -> None:
    softhooks.attach(zoo.build("llama"), PromptTuning(4)).save_pretrained(tmp_path / "en")
    with pytest.raises(CheckpointError, match="en"):
        softhooks.load(zoo.build("llama"), tmp_path)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected: +soft_prompt\.safetensors or adapter_config\.json"):
        softhooks.load(zoo.build("llama"), empty)


@pytest.mark.parametrize(
    "method", [PromptTuning(4), PrefixTuning(4, projection=True), PTuning(4)], ids=lambda m: m.kind
)
def test_a_whole_model_with_a_stray_prompt_is_refused_with_a_way_out_that_works(method: Any, tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text()
    softhooks.attach(model, method)
    expected = model(ids).logits
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    fresh = zoo.build("llama")
    with pytest.raises(CheckpointError, match="whole model") as error:
        softhooks.load(fresh, tmp_path)
    assert "soft_prompt.default.encoder" in str(error.value)
    prompt = softhooks.attach(fresh, method)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "soft_prompt." in n}
    fresh.load_state_dict(tensors, strict=False)
    prompt.save_pretrained(tmp_path / "mended")
    again = zoo.build("llama")
    softhooks.load(again, tmp_path / "mended")
    torch.testing.assert_close(again(ids).logits, expected)


def test_a_whole_model_in_shards_is_known_by_its_index(tmp_path: Path) -> None:
    index = {
        "weight_map": {"model.norm.weight": "a.safetensors", "soft_prompt.default.encoder.embeddings": "b.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="whole model"):
        softhooks.load(zoo.build("llama"), tmp_path)
