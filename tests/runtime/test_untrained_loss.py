"""The loss of a frozen prompt can be read, and its `backward` says what is missing."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from untouched import remove_all

import softhooks
from softhooks import PromptTuning, SoftPrompt, TrainerError

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def loss_of(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS).loss


def loaded(folder: Path, arch: str = "llama", **options: Any) -> tuple[Any, SoftPrompt]:
    model = zoo.build(arch)
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        prompt.save_pretrained(folder)
    return model, softhooks.load(model, folder, **options)


# --- a loaded prompt --------------------------------------------------------------------------------------------------

BACKWARDS: dict[str, Callable[[Any], Any]] = {
    "loss.backward()": lambda model: loss_of(model).backward(),
    "(loss / 4).backward()": lambda model: (loss_of(model) / 4).backward(),
    "a sum": lambda model: (loss_of(model) + 0.5 * loss_of(model)).backward(),
    "a tuple": lambda model: model(input_ids=IDS, labels=IDS, return_dict=False)[0].backward(),
    "of logits": lambda model: torch.nn.functional.cross_entropy(
        model(IDS).logits.flatten(0, 1), IDS.flatten()
    ).backward(),
    "of a tuple's logits": lambda model: model(IDS, return_dict=False)[0].square().mean().backward(),
    "of a state": lambda model: model.base_model(IDS).last_hidden_state.sum().backward(),
    "scaled": lambda model: torch.amp.GradScaler("cpu").scale(loss_of(model)).backward(),
}


@pytest.mark.parametrize("way", BACKWARDS)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_training_a_prompt_that_was_loaded_frozen_names_trainable(
    arch: str, is_training: bool, way: str, tmp_path: Path
) -> None:
    model, _ = loaded(tmp_path, arch)
    model.train(is_training)
    with pytest.raises(TrainerError, match="trainable=True"):
        BACKWARDS[way](model)


def test_training_a_prompt_that_was_loaded_frozen_through_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, _ = loaded(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    with pytest.raises(TrainerError, match="trainable=True"):
        accelerator.backward(loss_of(prepared))


def test_a_prompt_that_was_loaded_to_be_trained_trains(tmp_path: Path) -> None:
    model, prompt = loaded(tmp_path, trainable=True)
    start = prompt.embeddings().detach().clone()
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(prompt.embeddings(), start)


def test_the_loss_of_a_frozen_prompt_is_read_as_any_other(tmp_path: Path) -> None:
    model, _ = loaded(tmp_path)
    loss = loss_of(model)
    with torch.no_grad():
        expected = loss_of(model)
    assert type(expected) is torch.Tensor
    assert not loss.requires_grad
    assert loss.item() == float(loss) == float(loss.numpy()) == expected.item()
    assert torch.equal(torch.stack([loss, loss]).mean(), expected)
    assert f"{loss:.3f} {2 * loss:.3f}" == f"{expected:.3f} {2 * expected:.3f}"
    assert str(loss) == str(expected)
    assert str(torch.stack([loss, loss])) == str(torch.stack([expected, expected]))
    assert type(pickle.loads(pickle.dumps(loss))) is torch.Tensor
    logits = model(IDS).logits
    assert not logits.requires_grad
    assert logits.argmax(-1).numpy().shape == IDS.shape


def test_a_frozen_prompt_is_a_teacher(tmp_path: Path) -> None:
    """Its logits and its loss are constants in the loss of another model."""
    teacher, _ = loaded(tmp_path)
    student = zoo.build("gpt2")
    prompt = softhooks.attach(student, PromptTuning(4))
    given = teacher(input_ids=IDS, labels=IDS)
    found = student(input_ids=IDS, labels=IDS)
    distance = (found.logits - given.logits).square().mean()
    (distance + found.loss * given.loss + given.loss + found.loss / given.loss).backward()
    assert any(p.grad is not None for p in prompt.parameters())


def test_lora_trains_under_a_frozen_prompt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path)
    softhooks.load(model, tmp_path)
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in lora:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(lora, lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert all(p.grad is not None for p in lora)


def test_gradients_of_embeddings_pass_a_frozen_prompt(tmp_path: Path) -> None:
    model, _ = loaded(tmp_path)
    embedded = model.get_input_embeddings()(IDS).requires_grad_(True)
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None
