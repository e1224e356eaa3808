"""Backwards that run layers again, and training, while other threads run the model."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zoo
from paused import Paused, answer
from table import BY_NAME
from thread_cases import Crowd, Waits, attach, build, model_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, UnsupportedModeError
from softhooks.runtime.prompted_model import require_prompted_model


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


WAYS = ["shared", "slots", "prefix", "cache", "context", "scaled layers"]
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def checkpointed(model: Any, reentrant: bool) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@REENTRANT
@pytest.mark.parametrize("way", WAYS)
def test_layers_that_run_again_in_another_thread(way: str, reentrant: bool) -> None:
    """The backward runs them, in whatever thread it is called, with another prompt on."""
    model, prompt, calls = build(way)
    softhooks.attach(model, PrefixTuning(7), "other")
    softhooks.activate(model, "default")
    parameters = list(prompt.encoder.parameters())

    def gradients() -> list[Tensor]:
        return [p.grad.clone() for p in parameters]

    model.train()
    calls[0]().square().sum().backward()
    expected = gradients()
    checkpointed(model, reentrant)
    for parameter in parameters:
        parameter.grad = None
    loss = calls[0]().square().sum()
    softhooks.activate(model, "other")
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for ours, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch's, in the inference
@REENTRANT
@pytest.mark.parametrize("way", WAYS)
def test_forwards_while_another_thread_trains(way: str, reentrant: bool) -> None:
    """Each stop of the training thread is at another call of an attention module: in its forward, or again in its backward."""
    model, _, calls = build(way)
    parameters = list(softhooks.attach(model, PrefixTuning(7), "other").encoder.parameters())
    parameters += list(require_prompted_model(model).prompts["default"].encoder.parameters())
    checkpointed(model, reentrant)

    def train() -> list[Tensor]:
        softhooks.activate(model, "default")
        with torch.enable_grad():
            loss = calls[0]().square().sum()
        found = (
            torch.autograd.grad(loss, parameters, allow_unused=True) if not reentrant else _reentrant(loss, parameters)
        )
        return [one for one in found if one is not None]

    def infer() -> list[Tensor]:
        found = []
        for context in (
            softhooks.rows(model, ["other"]),
            softhooks.rows(model, ["default"]),
            softhooks.disabled(model),
        ):
            with context, torch.no_grad():
                found.append(model(zoo.text(1, 6, seed=2)).logits)
        return found

    expected, right = train(), infer()
    module = require_prompted_model(model).structure.entry.sites[0].module
    stops = 0
    for number in range(8):
        count = [0]

        first = Paused(train)

        def stop(*_call: Any, first: Paused = first, count: list[int] = count, number: int = number) -> None:
            if threading.current_thread().name == "first":
                count[0] += 1
                if count[0] > number:
                    first.stop()

        handle = module.register_forward_pre_hook(stop)
        with first:
            if first.reached:
                stops += 1
                for one, other in zip(infer(), right, strict=True):
                    assert torch.equal(one, other), number
        handle.remove()
        assert not isinstance(first.result, Exception), first.result
        for one, other in zip(first.result, expected, strict=True):
            assert torch.equal(one, other), number
        if not first.reached:
            break
    assert stops >= 2  # once in the forward, and once more in the backward


def _reentrant(loss: Tensor, parameters: list[Any]) -> list[Tensor | None]:
    """Gradients with `backward`, the only function that supports reentrant checkpoints."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]


@REENTRANT
def test_threads_that_train_different_prompts(reentrant: bool) -> None:
    """They meet in the model's forwards; each accumulates the gradients of its own prompt."""
    model, count = model_of("prefix"), 4
    prompts = [attach(model, "prefix", str(number)) for number in range(count)]
    checkpointed(model, reentrant)

    def train(number: int) -> list[Tensor]:
        with softhooks.rows(model, [str(number)]), torch.enable_grad():
            loss = model(zoo.text(1, 5, seed=number)).logits.square().sum()
        loss.backward()
        found = [parameter.grad.clone() for parameter in prompts[number].encoder.parameters()]
        for parameter in prompts[number].encoder.parameters():
            parameter.grad = None
        return found

    expected = [train(number) for number in range(count)]
    crowd = Crowd(model.model.layers[0].self_attn, count)
    rounds = [[lambda number=number: train(number) for number in range(count)] for _ in range(3)]
    for found in crowd.run(rounds):
        for one, other in zip(found, expected, strict=True):
            assert not isinstance(one, Exception), one
            assert all(map(torch.equal, one, other))
    assert crowd.meetings == 3


@pytest.mark.parametrize("way", ["slots", "prefix"])
def test_a_bare_forward_whose_layers_run_again_after_its_block(way: str) -> None:
    model, _, calls = build(way)
    softhooks.attach(model, PrefixTuning(7), "other")
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    model.train()

    def gradient() -> Tensor:
        with softhooks.disabled(model):
            loss = calls[0]().square().sum()
        (found,) = torch.autograd.grad(loss, weight)
        return found

    expected = gradient()
    checkpointed(model, False)
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)


@REENTRANT
def test_a_whole_model_that_runs_again(reentrant: bool) -> None:
    """It would use the prompts that are on during the backward: refused if these may differ."""
    model, ids = zoo.build("llama").train(), zoo.text(2, 6)
    prompts = [softhooks.attach(model, PrefixTuning(3), name) for name in ("a", "b")]
    embedded = model.get_input_embeddings()(ids).requires_grad_()

    def logits(embedded: Tensor) -> Tensor:
        return model(inputs_embeds=embedded).logits

    def run(again: bool, name: str | None) -> Tensor:
        with softhooks.rows(model, [name, "b"]) if name else contextlib.nullcontext():
            loss = checkpoint(logits, embedded, use_reentrant=reentrant) if again else logits(embedded)
        return loss.square().sum()

    (expected,) = torch.autograd.grad(run(False, None), prompts[1].encoder.parameters())
    run(True, None).backward()
    torch.testing.assert_close(next(prompts[1].encoder.parameters()).grad, expected)
    with pytest.raises(UnsupportedModeError, match="the prompts may have changed since its first run"):
        run(True, "a").backward()
    assert require_prompted_model(model).running.call is None


# --- training forwards that change the model --------------------------------------------------------------------------

ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout is off": ("prompt", {"freeze_dropout": True}),
    "a teacher with a document": ("cartridge-distilled", {}),
    "teachers of tasks": ("mpt-taught", {}),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_training_forward_that_changes_the_model_runs_alone(kind: str) -> None:
    """Forwards of other threads wait for its end, so that both are right."""
    entry, options = BY_NAME[ALONE[kind][0]], ALONE[kind][1]
    model, ids = zoo.build("llama").train(), zoo.text(2, 6)
    softhooks.attach(model, PrefixTuning(2), "other")
    prompt = softhooks.attach(model, entry.make(4), **options)
    entry.wake(prompt)
    order: list[str] = []

    def train() -> list[Tensor | None]:
        with torch.enable_grad():
            loss = model(ids, labels=ids, **entry.extra(range(2))).loss
        return list(torch.autograd.grad(loss, list(prompt.parameters()), allow_unused=True))

    def infer() -> Tensor:
        with softhooks.rows(model, ["other"]):
            found: Tensor = model(zoo.text(1, 5)).logits
        return found

    expected, right = train(), answer(infer)
    model.lm_head.register_forward_hook(lambda *_: order.append(threading.current_thread().name))
    results: list[Any] = []
    with Paused(train, model.model.layers[1]) as first:
        assert first.reached
        waits = Waits(model)
        second = threading.Thread(target=lambda: results.append(answer(infer)), name="second")
        second.start()
        assert waits.begun.wait(300)
    second.join()
    assert torch.equal(results[0], right)
    assert order[-1] == "second"
    assert set(order[:-1]) == {"first"}
    assert not isinstance(first.result, Exception), first.result
    for one, other in zip(first.result, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_many_forwards_beside_forwards_that_change_the_model() -> None:
    model, interval = zoo.build("llama").train(), sys.getswitchinterval()
    prompts = [softhooks.attach(model, PrefixTuning(3), name, freeze_dropout=True) for name in ("a", "b")]
    texts = [zoo.text(1, 4 + number, seed=number) for number in range(4)]

    def train(number: int) -> list[Tensor]:
        with softhooks.rows(model, ["ab"[number % 2]]), torch.enable_grad():
            loss = model(texts[number]).logits.square().sum()
        return list(torch.autograd.grad(loss, list(prompts[number % 2].encoder.parameters())))

    def infer(number: int) -> list[Tensor]:
        with softhooks.disabled(model), torch.no_grad():
            return [model(texts[number]).logits]

    calls = [lambda number=number, call=call: call(number) for call in (train, infer) for number in range(4)]
    expected = [call() for call in calls]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda call: [call() for _ in range(6)], calls))
    finally:
        sys.setswitchinterval(interval)
    for each, right in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one_call in each for one, other in zip(one_call, right, strict=True))
    assert all(module.training for module in model.modules())
