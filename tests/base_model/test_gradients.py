"""Gradients from before a prompt was attached have no effect while it is, and return with the removal of the last
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning, SoftPromptCallback

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def _backward(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


def _with_gradients(arch: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    model = zoo.build(arch)
    _backward(model)
    return model, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _is_back(model: Any, before: dict[str, Tensor]) -> bool:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found.keys() == before.keys() and all(found[name] is before[name] for name in before)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=1e-2, max_iter=1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_optimizer_over_all_parameters_moves_the_prompt_alone(arch: str, optimizer: str) -> None:
    model, _ = _with_gradients(arch)
    prompt = softhooks.attach(model, PromptTuning(4))
    start = prompt.embeddings().detach().clone()
    own = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        _backward(model)
        own.step(lambda: torch.tensor(0.0)) if optimizer == "lbfgs" else own.step()
        own.zero_grad()
    prompt.verify_frozen()
    assert not torch.equal(prompt.embeddings(), start)


def test_clipping_sees_the_gradients_of_the_prompt_alone() -> None:
    model, _ = _with_gradients()
    prompt = softhooks.attach(model, PromptTuning(4))
    _backward(model)
    own = torch.stack([p.grad.norm() for p in prompt.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9), own)


def test_an_optimizer_with_momentum_from_before_moves_no_frozen_weight() -> None:
    model, _ = _with_gradients()
    own = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    own.step()
    prompt = softhooks.attach(model, PromptTuning(4))
    own.add_param_group({"params": list(prompt.parameters())})
    _backward(model)
    own.step()
    prompt.verify_frozen()


def test_gradients_come_back_with_the_last_prompt_that_goes() -> None:
    model, before = _with_gradients()
    first = softhooks.attach(model, PromptTuning(4), "first")
    second = softhooks.attach(model, PrefixTuning(4), "second")
    first.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    second.remove()
    assert _is_back(model, before)


def test_gradients_come_back_when_attach_fails() -> None:
    model, before = _with_gradients("bert")
    with pytest.raises(softhooks.SoftHooksError):
        softhooks.attach(model, PromptTuning(4), injection="shared")
    assert _is_back(model, before)
    model, before = _with_gradients()
    with pytest.raises(softhooks.SoftHooksError):
        softhooks.attach(model, PromptTuning(4), injection="branch")
    assert _is_back(model, before)


def test_a_loaded_prompt_sets_gradients_aside_too(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path)
    model, before = _with_gradients()
    prompt = softhooks.load(model, tmp_path)
    assert all(parameter.grad is None for parameter in model.parameters())
    prompt.remove()
    assert _is_back(model, before)


def test_parameters_that_stay_trainable_keep_their_gradients() -> None:
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    _backward(model)
    before = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert before
    prompt = softhooks.attach(model, PromptTuning(4), trainable="*lora_A*")
    kept = {name for name, p in model.named_parameters() if p.grad is not None}
    assert kept == {name for name in before if "lora_A" in name}
    prompt.remove()
    assert _is_back(model, before)


def test_a_gradient_that_a_parameter_was_given_meanwhile_stays() -> None:
    model, before = _with_gradients()
    prompt = softhooks.attach(model, PromptTuning(4))
    weight = model.lm_head.weight
    weight.grad = given = torch.ones_like(weight)
    prompt.remove()
    assert weight.grad is given
    other = model.model.norm.weight
    assert other.grad is before["model.norm.weight"]


def test_gradients_follow_a_model_to_another_precision() -> None:
    model, before = _with_gradients()
    prompt = softhooks.attach(model, PromptTuning(4))
    model.to(torch.float64)
    prompt.remove()
    assert torch.equal(model.model.norm.weight.grad, before["model.norm.weight"].double())


def test_a_prompt_attached_again_has_no_gradient_from_before() -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4))
    _backward(model)
    prompt.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    softhooks.attach(model, PromptTuning(4))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_step_trains_two_prompts_each_by_its_own_gradients() -> None:
    """A prompt that is switched off keeps its gradients, which may belong to an unfinished step; `zero_grad` clears them."""
    model = zoo.build("llama")
    first = softhooks.attach(model, PromptTuning(4), "first")
    second = softhooks.attach(model, PromptTuning(4), "second")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients = []
    for name in ("first", "second"):
        prompt = softhooks.activate(model, name)
        _backward(model)
        gradients.append([p.grad for p in prompt.encoder.parameters()])
    assert all(gradient is not None for own in gradients for gradient in own)
    start = first.embeddings().detach().clone()
    optimizer.step()
    assert not torch.equal(first.embeddings(), start)
    optimizer.zero_grad()
    start = first.embeddings().detach().clone()
    _backward(model)
    optimizer.step()
    assert torch.equal(first.embeddings(), start), "it is off"
    assert all(p.grad is None for p in first.encoder.parameters())
    assert any(p.grad is not None for p in second.encoder.parameters())


def test_a_trainer_clips_by_the_gradients_of_its_own_prompt(tmp_path: Path) -> None:
    """Gradients of another prompt, from an earlier loop, are set aside while it is inactive, and restored."""
    model = zoo.build("llama", "sequence")
    other = softhooks.attach(model, PromptTuning(4), "other")
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    before = [p.grad for p in other.encoder.parameters()]
    for gradient in before:
        gradient.fill_(1e6)
    callback = SoftPromptCallback(PromptTuning(4), name="own")
    trainer = training.make(tmp_path, model, "sequence", [callback], max_steps=1)
    assert all(p.grad is None for p in other.encoder.parameters())
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms
    assert max(norms) < 1e3
    assert all(p.grad is own for p, own in zip(other.encoder.parameters(), before, strict=True))
