"""A model that contains a model with prompts is saved with its prompts, and without stray prompt tensors."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import training
import transformers as tf
import zoo
from safetensors.torch import load_file

import softhooks
from softhooks import PrefixTuning, PromptTuning

IDS = zoo.text()


def prompted() -> Any:
    model = zoo.build("llama")
    softhooks.attach(model.model, PromptTuning(4), "other")
    softhooks.attach(model.model, PrefixTuning(4))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def stray(folder: Path) -> list[str]:
    return [name for name in load_file(folder / "model.safetensors") if "soft_prompt" in name]


@pytest.mark.parametrize("made", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_outer_model_is_saved_with_the_prompts_beside_it(made: Any, tmp_path: Path) -> None:
    model = made(prompted())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert stray(tmp_path) == []
    again, info = tf.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    softhooks.load(again.model, tmp_path)
    torch.testing.assert_close(logits(again), expected)
    softhooks.load(again.model, tmp_path / "other", "other")
    softhooks.activate(model.model, "other")
    torch.testing.assert_close(logits(again), logits(model))


def test_what_was_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = prompted()
    with caplog.at_level(logging.WARNING, "softhooks"):
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    said = [record.getMessage() for record in caplog.records if "save_pretrained" in record.getMessage()]
    assert len(said) == 1
    assert "LlamaForCausalLM" in said[0]
    assert str(tmp_path) in said[0]


def test_a_plain_state_dict_of_the_outer_model_keeps_the_prompts() -> None:
    model = prompted()
    state = model.state_dict()
    assert sum("soft_prompt" in name for name in state) == 2
    assert prompted().load_state_dict(state).missing_keys == []


def test_with_the_prompts_off_the_outer_model_is_saved_alone(tmp_path: Path) -> None:
    model = prompted()
    with softhooks.disabled(model.model):
        model.save_pretrained(tmp_path)
    assert stray(tmp_path) == []
    assert not list(tmp_path.glob("soft_prompt*"))


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    prompted().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("soft_prompt*"))


def test_adapters_around_a_model_with_a_prompt_are_saved_with_it(tmp_path: Path) -> None:
    inner = zoo.build("llama")
    softhooks.attach(inner, PrefixTuning(4))
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert not any("soft_prompt" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = zoo.build("llama")
    with pytest.warns(UserWarning, match="trained with this prompt"):
        softhooks.load(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(inner))


def test_a_trainer_of_the_outer_model_resumes_its_prompt(tmp_path: Path) -> None:
    def run(resume: bool) -> Any:
        model = zoo.build("llama")
        softhooks.attach(model.model, PrefixTuning(4))
        model.lm_head.requires_grad_(False)
        trainer = training.make(tmp_path, model, "causal", [], save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return model

    whole = run(resume=False)
    assert stray(tmp_path / "checkpoint-2") == ["model.soft_prompt.default.encoder.text"]
    assert torch.equal(logits(run(resume=True)), logits(whole))
    alone = zoo.build("llama")
    softhooks.load(alone.model, tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(alone), logits(whole))
