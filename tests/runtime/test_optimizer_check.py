"""A step of an optimizer that leaves the prompt out raises or warns; all other steps run unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch.optim import optimizer as torch_optimizer
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning, TrainerError

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def loss_of(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS).loss


# --- an optimizer from before -----------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4)])
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_an_optimizer_made_before_attach_is_told_at_its_first_step(arch: str, method: Any, optimizer: str) -> None:
    model = zoo.build(arch, "seq2seq" if arch == "t5" else "causal")
    early = OPTIMIZERS[optimizer](model.parameters())
    softhooks.attach(model, method)
    loss_of(model).backward()
    with pytest.raises(TrainerError, match=r"(?s)Make the optimizer after `softhooks\.attach`"):
        early.step()


def test_an_optimizer_of_a_frozen_model_made_before_attach_is_told() -> None:
    model = zoo.build("llama").requires_grad_(False)
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    softhooks.attach(model, PromptTuning(4))
    loss_of(model).backward()
    with pytest.raises(TrainerError, match="trains nothing"):
        early.step()


def test_an_optimizer_prepared_by_accelerate_before_attach_is_told() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = zoo.build("llama")
    accelerator = accelerate.Accelerator(cpu=True)
    model, early = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    softhooks.attach(model, PromptTuning(4))
    accelerator.backward(loss_of(model))
    with pytest.raises(TrainerError, match="trains nothing"):
        early.step()


def test_an_optimizer_that_the_prompt_was_added_to_trains() -> None:
    model = zoo.build("llama")
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4))
    early.add_param_group({"params": list(prompt.parameters())})
    start = prompt.embeddings().detach().clone()
    loss_of(model).backward()
    early.step()
    assert not torch.equal(prompt.embeddings(), start)


def test_an_optimizer_of_the_base_beside_one_of_the_prompt_is_no_mistake() -> None:
    """Several optimizers that step in turn, as in adversarial training."""
    model = zoo.build("llama")
    base = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4))
    own = torch.optim.AdamW(prompt.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(model).backward()
        base.step()
        own.step()
        own.zero_grad()
    prompt.verify_frozen()


def test_optimizers_of_other_models_and_of_nothing_yet_are_left_alone() -> None:
    model, other = zoo.build("llama"), zoo.build("gpt2")
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4))
    early.step()  # no gradient has reached the prompt
    loss_of(model).backward()
    strange = torch.optim.AdamW(other.parameters(), lr=0.1)
    strange.step()
    loss_of(other).backward()
    strange.step()
    assert any(p.grad is not None for p in prompt.parameters())


def test_an_optimizer_of_lora_that_stays_trainable_steps() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4), trainable="*lora_*")
    loss_of(model).backward()
    with pytest.warns(UserWarning, match="so the prompt is not trained"):
        early.step()
    loss_of(model).backward()
    early.step()  # said once
    own = torch.optim.AdamW(prompt.encoder.parameters(), lr=0.1)
    early.step()
    own.step()


def test_an_optimizer_of_lora_beside_one_of_the_prompt_is_no_mistake() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4), trainable="*lora_*")
    own = torch.optim.AdamW(prompt.encoder.parameters(), lr=0.1)
    loss_of(model).backward()
    early.step()
    own.step()


def test_an_optimizer_of_the_first_prompt_is_told_when_a_second_one_trains() -> None:
    model = zoo.build("llama")
    first = softhooks.attach(model, PromptTuning(4), "first")
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    second = softhooks.attach(model, PromptTuning(4), "second")
    for _ in range(2):
        loss_of(model).backward()
        with pytest.raises(TrainerError, match=r"(?s)trains nothing.*'second'"):
            optimizer.step()
    optimizer.add_param_group({"params": list(second.parameters())})
    optimizer.step()


def test_an_optimizer_whose_prompt_rests_is_no_mistake() -> None:
    model = zoo.build("llama")
    first = softhooks.attach(model, PromptTuning(4), "first")
    loss_of(model).backward()
    assert any(parameter.grad is not None for parameter in first.parameters())
    second = softhooks.attach(model, PromptTuning(4), "second")
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()


def test_two_prompts_with_an_optimizer_each() -> None:
    model = zoo.build("llama")
    optimizers = {}
    for name in ("a", "b"):
        prompt = softhooks.attach(model, PromptTuning(4), name)
        optimizers[name] = torch.optim.AdamW(prompt.encoder.parameters(), lr=0.1)
    softhooks.activate(model, "b")
    loss_of(model).backward()
    for optimizer in optimizers.values():
        optimizer.step()


def test_nobody_listens_when_the_last_prompt_is_gone() -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    model = zoo.build("llama")
    early = torch.optim.AdamW(model.parameters(), lr=0.1)
    prompt = softhooks.attach(model, PromptTuning(4))
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    prompt.remove()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
    loss_of(model).backward()
    early.step()
