"""Every method in all three ways of use, in generation, and with other prompts, on a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import training
import zoo
from table import TABLE, Entry
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, SoftPromptCallback

CASE = zoo.Case("llama", "causal")
ENTRIES = [entry for entry in TABLE if entry.fits(CASE)]
IDS = zoo.text(3, 6, seed=4)


@torch.no_grad()
def answer(model: Any, entry: Entry) -> Tensor:
    return model.eval()(zoo.text(2, 7, seed=8), **entry.extra(range(2))).logits.clone()


def train(model: Any, parameters: Any, entry: Entry) -> None:
    """A plain training loop."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(3):
        model(IDS, labels=IDS, **entry.extra(range(3))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_loop_and_a_decorated_function_train_the_same_prompt(tmp_path: Path, entry: Entry) -> None:
    torch.manual_seed(1)
    method = entry.make(3)
    model = zoo.build("llama")
    torch.manual_seed(2)
    with softhooks.attach(model, method) as prompt:
        before = answer(model, entry)
        train(model, list(prompt.parameters()), entry)
        expected = answer(model, entry)
        prompt.verify_frozen()
    assert not torch.allclose(before, expected, atol=1e-4)

    @softhooks.tune(method, save_to=tmp_path)
    def tuned(model: Any) -> None:
        train(model, [parameter for parameter in model.parameters() if parameter.requires_grad], entry)

    fresh = zoo.build("llama")
    torch.manual_seed(2)
    tuned(fresh)
    assert not hasattr(fresh, "soft_prompt")
    with softhooks.load(fresh, tmp_path):
        assert torch.equal(answer(fresh, entry), expected)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_trainer_with_one_callback_trains_saves_and_resumes(tmp_path: Path, entry: Entry) -> None:
    torch.manual_seed(1)
    method = entry.make(3)
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run() -> tuple[Any, SoftPromptCallback]:
        trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", method, **options)
        for number, row in enumerate(trainer.train_dataset):
            row |= {name: values[0] for name, values in entry.extra([number]).items()}
        return trainer, callback

    whole, callback = run()
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    resumed, other = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(other), training.trained(callback))
    expected = answer(whole.model, entry)
    for each in (callback, other):
        assert each.report is not None
        assert each.soft_prompt is not None
        each.soft_prompt.remove()
    fresh = zoo.build("llama")
    with softhooks.load(fresh, tmp_path / "saved"):
        assert torch.equal(answer(fresh, entry), expected)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_it_generates_beside_other_prompts(entry: Entry) -> None:
    """A batch whose rows have this prompt, a longer one of its kind, a prefix where that can be, and none."""
    model = naive.endless(zoo.build("llama"))
    names: list[str | None] = ["one", "two", None]
    kinds = {name: entry.make(count) for name, count in (("one", 2), ("two", 4))}
    prompts = {name: softhooks.attach(model, method, name) for name, method in kinds.items()}
    for prompt in prompts.values():
        entry.wake(prompt)
    if prompts["one"].injection not in ("slots", "branch"):
        softhooks.attach(model, PrefixTuning(3), "prefix")
        names.append("prefix")
    model.eval()
    batch = naive.left_padded([zoo.text(1, 3 + n, seed=n)[0] for n in range(len(names))])
    columns = entry.extra(range(len(names)))
    batch |= columns
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with softhooks.rows(model, names):
        together = model.generate(**batch, **options)
    for row, name in enumerate(names):
        taken = [key for key in batch if name != "prefix" or key not in columns]  # a prefix alone takes no column
        alone = {key: batch[key][row : row + 1] for key in taken}
        with softhooks.rows(model, [name]):
            assert torch.equal(model.generate(**alone, **options)[0], together[row]), name
    for name in [name for name in names if name]:
        softhooks.activate(model, name).remove()
    assert not hasattr(model, "soft_prompt")
