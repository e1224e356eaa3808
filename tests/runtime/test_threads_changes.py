"""Changes of a model's prompts while other threads run the model: they wait for these threads; `activate` does not."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from paused import Paused, answer
from thread_cases import Waits, build
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning, PTuning, UnsupportedModeError
from softhooks.inject.prefill import logits_of
from softhooks.runtime.prompted_model import require_prompted_model
from softhooks.runtime.running import RunningCalls

NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": zoo.PAD}
FIRST = (
    r"^another thread \(.+\) is (running|attaching the first prompt of) the model(.|\n)*before you start the threads"
)


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


class Asked:
    """A call in a thread of its own, which waits for the call of another thread."""

    def __init__(self, model: Any, call: Callable[[], Any]) -> None:
        waits = Waits(model)
        self.result: Any = None
        self.thread = threading.Thread(target=lambda: setattr(self, "result", answer(call)), name="second")
        self.thread.start()
        assert waits.begun.wait(300)

    def finish(self) -> Any:
        self.thread.join()
        return self.result


CHANGES: dict[str, Callable[[Any, softhooks.SoftPrompt, Path], Any]] = {
    "attach": lambda model, prompt, folder: softhooks.attach(model, PrefixTuning(3), "more"),
    "load": lambda model, prompt, folder: softhooks.load(model, folder, name="more"),
    "remove": lambda model, prompt, folder: prompt.remove(),
    "fold": lambda model, prompt, folder: prompt.fold(),
    "logits of states": lambda model, prompt, folder: logits_of(
        model, prompt.prompted_model.structure.entry, torch.randn(1, 2, 32), 5
    ),
}


@pytest.mark.parametrize("asked", CHANGES)
def test_a_change_waits_for_the_forwards_of_other_threads(asked: str, tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    prompt = softhooks.attach(model, PTuning(5, encoder="mlp"))
    prompt.save_pretrained(tmp_path)
    expected, encoder = answer(lambda: model(ids).logits), prompt.encoder
    with Paused(lambda: model(ids).logits, model.model.layers[1]) as first:
        second = Asked(model, lambda: CHANGES[asked](model, prompt, tmp_path))
        assert list(prompt.prompted_model.prompts) == ["default"]
        assert prompt.is_attached
        assert prompt.encoder is encoder
        assert prompt.verify_frozen().tensors
        prompt.save_pretrained(tmp_path)
    found = second.finish()
    assert not isinstance(found, Exception), found
    assert torch.equal(first.result, expected)
    assert (asked in ("attach", "load")) == (len(prompt.prompted_model.prompts) == 2)
    assert prompt.is_attached == (asked != "remove")


@pytest.mark.parametrize("asked", ["attach", "remove", "fold"])
def test_a_change_inside_a_forward_cannot_wait(asked: str, tmp_path: Path) -> None:
    """Two threads could wait for each other."""
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    prompt = softhooks.attach(model, PTuning(5, encoder="mlp"))
    found: list[Any] = []
    with Paused(lambda: model(ids).logits, model.model.layers[1]):
        handle = model.lm_head.register_forward_hook(
            lambda *_: found.append(answer(lambda: CHANGES[asked](model, prompt, tmp_path)))
        )
        with torch.no_grad():
            model(ids)
        handle.remove()
    assert isinstance(found[0], UnsupportedModeError)
    assert "cannot run while another thread (first) is running the forward of LlamaForCausalLM" in str(found[0])
    assert list(prompt.prompted_model.prompts) == ["default"]
    assert prompt.is_attached


@pytest.mark.parametrize("asked", ["forward", "the stack", "generate", "bare", "activate"])
def test_calls_wait_while_another_thread_attaches(asked: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    for name in ("a", "b"):
        softhooks.attach(model, PromptTuning(3), name)

    def bare() -> Tensor:
        with softhooks.disabled(model):
            return model(ids).logits

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(ids).logits,
        "the stack": lambda: model.model(ids)[0],
        "generate": lambda: model.generate(ids, **NEW),
        "bare": bare,
        "activate": lambda: softhooks.activate(model, "a"),
    }
    before = answer(bare)
    with Paused(lambda: softhooks.attach(model, PrefixTuning(3), "more"), model.model.layers[1]) as first:
        assert first.reached
        second = Asked(model, calls[asked])
    found = second.finish()
    assert first.result.is_attached
    if asked == "activate":
        assert found.name == require_prompted_model(model).active == "a"
    else:
        assert torch.equal(found, answer(calls[asked]))  # it began after `attach`
    assert torch.equal(answer(bare), before)


def test_activate_does_not_change_what_is_running() -> None:
    """Neither between two forwards of a generation, nor inside a forward; calls that begin later use the new prompt."""
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    for name in ("a", "b"):
        with torch.no_grad():
            softhooks.attach(model, PromptTuning(3), name).encoder.embeddings.normal_(std=3)
    calls: list[Callable[[], Tensor]] = [
        lambda: model(ids).logits,
        lambda: model.generate(ids, logits_processor=[process], **NEW),
    ]

    def process(_ids: Tensor, scores: Tensor) -> Tensor:
        first.stop()
        return scores

    first = Paused(calls[1])
    expected = {}
    for name in ("a", "b"):
        softhooks.activate(model, name)
        expected[name] = [answer(call) for call in calls]
    assert not torch.equal(expected["a"][0], expected["b"][0])
    for number, call in enumerate(calls):
        softhooks.activate(model, "a")
        first = Paused(call, None if number else model.model.layers[0])
        with first:
            assert first.reached
            assert softhooks.activate(model, "b").name == "b"
            assert torch.equal(answer(calls[0]), expected["b"][0])
        assert torch.equal(first.result, expected["a"][number])
        assert torch.equal(answer(calls[number]), expected["b"][number])


def test_label_names_while_another_thread_runs_the_model() -> None:
    """The config belongs to the model: a block `disabled` changes its names only if no other thread runs the model."""
    model, ids = zoo.build("bert", "sequence"), zoo.text(1, 6)
    own = dict(model.config.id2label)
    softhooks.attach(model, PromptTuning(3))
    names = {0: "bad", 1: "good", **{number: str(number) for number in range(2, len(own))}}
    model.config.id2label = names
    with softhooks.disabled(model):
        assert model.config.id2label == own
    with Paused(lambda: model(ids).logits, model.classifier) as first:
        assert first.reached
        with softhooks.disabled(model):
            assert model.config.id2label == names
    assert model.config.id2label == names


# --- the first prompt -------------------------------------------------------------------------------------------------


def test_attaching_the_first_prompt_while_another_thread_runs_the_bare_model() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    expected = answer(lambda: model(ids).logits)
    with (
        Paused(lambda: model(ids).logits, model.model.layers[0]) as first,
        untouched(model),
        pytest.raises(UnsupportedModeError, match=FIRST),
    ):
        softhooks.attach(model, PromptTuning(3))
    assert torch.equal(first.result, expected)
    softhooks.attach(model, PromptTuning(3)).remove()


def test_a_forward_while_another_thread_attaches_the_first_prompt() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    expected = answer(lambda: model(ids).logits)
    for module in (model, model.model.layers[1]):
        with Paused(lambda: softhooks.attach(model, PrefixTuning(3), "more"), module) as first:
            assert first.reached
            for asked in (model, model.model):
                with pytest.raises(UnsupportedModeError, match=FIRST):
                    asked(ids)
        first.result.remove()
        assert torch.equal(answer(lambda: model(ids).logits), expected)


# --- forwards that have died ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """An exception after which torch runs no hooks."""


@pytest.mark.parametrize("ends", [True, False], ids=["the thread has ended", "the thread lives on"])
@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "encoder-decoder"])
def test_a_forward_that_died_in_another_thread(way: str, ends: bool) -> None:
    """Nobody waits for it."""
    model, prompt, calls = build(way)
    expected = [answer(call) for call in calls]
    for module in list(model.modules())[:12:3]:
        died, goes_on = threading.Event(), threading.Event()

        def die(*_call: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise Stop

        def run(died: threading.Event = died, goes_on: threading.Event = goes_on) -> None:
            with contextlib.suppress(Stop):
                calls[0]()
            died.set()
            if not ends:
                goes_on.wait(300)

        handle = module.register_forward_pre_hook(die)
        thread = threading.Thread(target=run)
        thread.start()
        assert died.wait(300)
        if ends:
            thread.join()
        for call, right in zip(calls, expected, strict=True):
            assert torch.equal(answer(call), right)
        prompt.fold()
        handle.remove()
        goes_on.set()
        thread.join()


def test_an_exclusive_forward_that_died_in_another_thread() -> None:
    """The mode of the modules, which it has changed, is restored by the next thread that runs the model."""
    model, ids = zoo.build("llama").train(), zoo.text(1, 6)
    softhooks.attach(model, PromptTuning(3), freeze_dropout=True)
    expected = answer(lambda: model(ids).logits)
    model.model.layers[0].register_forward_hook(
        lambda *_: _raise(Stop) if threading.current_thread() is thread else None
    )
    goes_on, died = threading.Event(), threading.Event()

    def run() -> None:
        with contextlib.suppress(Stop):
            model(ids)
        died.set()
        goes_on.wait(300)

    thread = threading.Thread(target=run)
    thread.start()
    assert died.wait(300)
    assert not model.model.training
    assert torch.equal(answer(lambda: model(ids).logits), expected)
    assert model.model.training
    goes_on.set()
    thread.join()


def test_an_exclusive_call_that_died_inside_a_call_that_is_not_exclusive() -> None:
    """The outer call goes on, and other threads run the model beside it."""
    running, goes_on, died, beside = RunningCalls(), threading.Event(), threading.Event(), threading.Event()

    def die() -> None:
        running.begin(object(), "the inner call", sys._getframe(), is_exclusive=lambda: True)

    def run() -> None:
        with running.block("the outer call"):
            die()
            died.set()
            goes_on.wait(300)

    def run_beside() -> None:
        with running.block("a call of another thread"):
            beside.set()

    threads = [threading.Thread(target=run), threading.Thread(target=run_beside)]
    threads[0].start()
    assert died.wait(300)
    threads[1].start()
    was_beside = beside.wait(60)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert was_beside


def _raise(error: type[BaseException]) -> None:
    raise error


@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "context", "the stack itself"])
def test_a_stack_called_by_itself_after_a_forward_that_died(way: str) -> None:
    """The arguments of the dead forward are not reused."""
    model, _, calls = build(way)
    expected = answer(calls[1])
    stack = model if way == "the stack itself" else model.model
    states = answer(lambda: stack(zoo.text(1, 4))[0])
    for module in (stack, stack.layers[0]):
        handle = module.register_forward_pre_hook(lambda *_: _raise(Stop))
        with pytest.raises(Stop):
            calls[0]()
        handle.remove()
        assert torch.equal(answer(lambda: stack(zoo.text(1, 4))[0]), states)
        assert torch.equal(answer(calls[1]), expected)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_what_runs_is_not_copied() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    for name in ("a", "b"):
        softhooks.attach(model, PrefixTuning(3), name)
    softhooks.activate(model, "a")
    running = require_prompted_model(model).running
    with running.exclusive("a test"):
        for other in (copy.deepcopy(running), pickle.loads(pickle.dumps(running))):
            assert isinstance(other, RunningCalls)
            assert other.call is None
            assert other.active == "a"
        with softhooks.disabled(model):
            twin = copy.deepcopy(model)
        assert torch.equal(answer(lambda: twin(ids).logits), answer(lambda: model(ids).logits))


# --- models that store state in their modules -------------------------------------------------------------------------


def test_models_whose_forwards_change_them_take_turns() -> None:
    """Without softhooks, a long text in one thread changes the frequencies of a text in another."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = zoo.build("llama", rope_parameters=rope, max_position_embeddings=16)
    softhooks.attach(model, PrefixTuning(3))
    assert require_prompted_model(model).structure.changes_modules
    calls = [lambda: model(zoo.text(1, 30)).logits, lambda: model.generate(zoo.text(1, 5, seed=2), **NEW)]
    expected = [answer(call) for call in calls]
    for number, module in enumerate((model.model.layers[0], model.lm_head)):
        with Paused(calls[number], module) as first:
            assert first.reached
            second = Asked(model, calls[1 - number])
        assert torch.equal(second.finish(), expected[1 - number])
        assert torch.equal(first.result, expected[number])
