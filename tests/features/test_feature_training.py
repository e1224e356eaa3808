"""Images and sound in an unmodified Trainer: trained with the callback, saved, loaded, and the base as before, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import features
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PTuningV2, SoftPromptCallback

ROWS, STEPS = 16, 12


def dataset(name: str) -> Dataset:
    """Images or sounds of two classes, which differ in their mean; for CTC, one of two words."""
    rows = []
    (argument, values) = next(iter(features.batch(name, ROWS).items()))
    for number, value in enumerate(values):
        label = number % 2
        labels = [3 + label, 5] if name == "wav2vec2" else label
        rows.append({argument: (value + label).tolist(), "labels": labels})
    return Dataset.from_list(rows).with_format("torch")


def train(name: str, method: softhooks.Method, folder: Path, **options: Any) -> tuple[Any, SoftPromptCallback, Trainer]:
    model, callback = features.build(name), SoftPromptCallback(method)
    torch.manual_seed(5)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=STEPS, per_device_train_batch_size=4,
        learning_rate=3e-2, logging_steps=1, save_strategy="steps", save_steps=6, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset(name), callbacks=[callback])
    trainer.train()
    return model, callback, trainer


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", PrefixTuning(4)),
        ("vit", PTuningV2(4)),
        ("vit", LlamaAdapter(4)),
        ("videomae", PrefixTuning(4)),
        ("ast", PrefixTuning(4)),
        ("wav2vec2", PrefixTuning(4)),
        ("hubert", LlamaAdapter(4)),
        ("whisper", PrefixTuning(4)),
    ],
    ids=str,
)
def test_a_trainer_trains_saves_and_loads(name: str, method: softhooks.Method, tmp_path: Path) -> None:
    model, callback, trainer = train(name, method, tmp_path)
    prompt = callback.soft_prompt
    assert prompt is not None
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-4:]) < sum(losses[:4])
    prompt.verify_frozen()
    call = features.batch(name)
    model.eval()
    trained = model(**call).logits
    prompt.save_pretrained(tmp_path / "prompt")
    for source in (tmp_path / "prompt", tmp_path / f"checkpoint-{STEPS}"):
        fresh = features.build(name)
        before = fresh(**call).logits
        with softhooks.load(fresh, source):
            torch.testing.assert_close(fresh(**call).logits, trained)
        assert torch.equal(fresh(**call).logits, before)


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    _, whole, _ = train("vit", PrefixTuning(4), tmp_path / "whole")
    model, callback = features.build("vit"), SoftPromptCallback(PrefixTuning(4))
    arguments = TrainingArguments(
        str(tmp_path / "whole"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=STEPS,
        per_device_train_batch_size=4, learning_rate=3e-2, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset("vit"), callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert whole.soft_prompt is not None
    assert callback.soft_prompt is not None
    for one, other in zip(whole.soft_prompt.parameters(), callback.soft_prompt.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_head_that_softhooks_does_not_copy_can_be_trained_too() -> None:
    model = features.build("wav2vec2")
    with softhooks.attach(model, PrefixTuning(4), trainable="lm_head.*"):
        assert [name for name, p in model.named_parameters() if p.requires_grad and "soft_prompt" not in name] == [
            "lm_head.weight",
            "lm_head.bias",
        ]


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "videomae", "ast"])
def test_a_base_model_and_its_prompt_are_loaded_in_one_line(name: str, tmp_path: Path) -> None:
    features.build(name).save_pretrained(tmp_path / "base")
    base = type(features.build(name)).from_pretrained(tmp_path / "base").eval()
    with softhooks.attach(base, PrefixTuning(4)) as prompt:
        expected = base(**features.batch(name)).logits
        prompt.save_pretrained(tmp_path / "prompt")
    model = softhooks.load_model(tmp_path / "prompt")
    torch.testing.assert_close(model.eval()(**features.batch(name)).logits, expected)


def test_a_prompt_of_images_does_not_fit_a_text_model(tmp_path: Path) -> None:
    import zoo

    with softhooks.attach(features.build("vit"), PrefixTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path)
    with pytest.raises(softhooks.SoftHooksError):
        softhooks.load(zoo.build("bert", "sequence"), tmp_path)


def test_a_summary_and_the_command_line_describe_the_prompt(tmp_path: Path) -> None:
    with softhooks.attach(features.build("vit"), PrefixTuning(4)) as prompt:
        assert "attention" in str(prompt.summary())
        prompt.save_pretrained(tmp_path)
    from typer.testing import CliRunner

    from softhooks.cli.app import app

    found = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert found.exit_code == 0, found.output
