"""Two threads on one model with a prompt: the second one is refused, whatever it calls, and the first is right."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from paused import Paused, answer
from table import BY_NAME
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from untouched import remove_all, untouched

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModeError
from softhooks.inject.prefill import logits_of
from softhooks.runtime.direct_forward import route_direct_calls
from softhooks.runtime.prompted_model import require_prompted_model
from softhooks.runtime.running import RunningCalls

REFUSAL = r"^another thread (.+) is running (.+)one forward at a time(.|\n)*under a lock"
NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": zoo.PAD}


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


def refused(result: Any) -> bool:
    return isinstance(result, UnsupportedModeError) and "one forward at a time" in str(result)


def cases() -> dict[str, tuple[str, str, Any, dict[str, Any], dict[str, Any]]]:
    """For each injection: a model, a method, and two calls that differ in their columns and text."""
    images = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(3)) * 5
    first, second = zoo.text(1, 6, seed=1), zoo.text(1, 6, seed=2)
    ids = [{"input_ids": one} for one in (first, second)]
    pairs = [{"input_ids": one, "decoder_input_ids": other} for one, other in ((first, second), (second, first))]
    padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    return {
        "shared": ("llama", "causal", PromptTuning(6), *ids),
        "shared, padded": ("gpt2", "causal", PromptTuning(6), ids[0], {**ids[1], "attention_mask": padded}),
        "slots": ("llama", "causal", PromptTuning(3, placement="after_first"), *ids),
        "prefix": ("qwen3", "causal", PrefixTuning(4), *ids),
        "cache": ("gptj", "causal", PrefixTuning(4), *ids),
        "written out": ("deberta", "sequence", PrefixTuning(4), *ids),
        "head": ("bert", "sequence", PromptTuning(4), *ids),
        "context": (
            "llama", "causal", LlamaAdapter(3, context_size=5),
            *({**one, "prompt_context": image} for one, image in zip(ids, images, strict=True)),
        ),
        "tasks": (
            "llama", "causal", BY_NAME["mpt-tasks"].make(3),
            *({**one, "task_ids": torch.tensor([task])} for task, one in enumerate(ids)),
        ),
        "encoder-decoder": ("t5", "seq2seq", PromptTuning(4), *pairs),
        "prefixes of an encoder-decoder": ("bart", "seq2seq", PrefixTuning(4), *pairs),
        "the stack itself": ("llama", "base", PromptTuning(6), *ids),
    }  # fmt: skip


CASES = cases()


def build(way: str) -> tuple[Any, softhooks.SoftPrompt, list[Callable[[], Tensor]]]:
    arch, head, method, *calls = CASES[way]
    model = zoo.build(arch, "causal").base_model if head == "base" else zoo.build(arch, head)
    prompt = softhooks.attach(model, method)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, prompt, [lambda call=call: zoo.main_output(model(**call)) for call in calls]


def fresh(prompt: softhooks.SoftPrompt) -> None:
    """Make the next forward compute the prompt again, as the first one after `load` does."""
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.mul_(1.0)


@pytest.mark.parametrize("way", CASES)
def test_a_forward_while_another_one_stands_anywhere(way: str) -> None:
    """Stop before and after every module of the model: in the prompt's own run, between two hooks, in the head."""
    model, prompt, calls = build(way)
    expected = [answer(call) for call in calls]
    assert not torch.equal(*expected)
    overlaps = 0
    for module in list(model.modules()):
        for before in (True, False) if any(module.children()) or not overlaps % 3 else (True,):
            fresh(prompt)
            with Paused(calls[0], module, before) as first:
                second = answer(calls[1])
            overlaps += first.reached
            own_rows = way == "the stack itself"  # they are a call of the model, too
            is_over = not first.reached or (module is model and not before and not own_rows)
            assert torch.equal(first.result, expected[0]), first.result
            assert torch.equal(second, expected[1]) if is_over else refused(second), (type(module), before, second)
            if not is_over:
                assert torch.equal(answer(calls[1]), expected[1])
    assert overlaps > 20


WAYS_IN: dict[str, Callable[[Any, softhooks.SoftPrompt, Path], Any]] = {
    "forward": lambda model, prompt, folder: model(zoo.text(1, 5)),
    "the stack": lambda model, prompt, folder: model.model(zoo.text(1, 5)),
    "generate": lambda model, prompt, folder: model.generate(zoo.text(1, 5), **NEW),
    "keys and values": lambda model, prompt, folder: prompt.key_values(prompt.prompted_model.structure.entry),
    "logits of states": lambda model, prompt, folder: logits_of(
        model, prompt.prompted_model.structure.entry, torch.randn(1, 2, 32), 5
    ),
    "attach": lambda model, prompt, folder: softhooks.attach(model, PrefixTuning(3), "more"),
    "load": lambda model, prompt, folder: softhooks.load(model, folder, name="more"),
    "remove": lambda model, prompt, folder: prompt.remove(),
    "fold": lambda model, prompt, folder: prompt.fold(),
    "activate": lambda model, prompt, folder: softhooks.activate(model, "default"),
    "an ensemble": lambda model, prompt, folder: softhooks.PromptEnsemble(model, ["default"])(input_ids=zoo.text(1, 5)),
}


def _within(context: Callable[[Any], Any]) -> Callable[[Any, softhooks.SoftPrompt, Path], Any]:
    def ask(model: Any, _prompt: softhooks.SoftPrompt, _folder: Path) -> Any:
        with context(model):
            return model(zoo.text(1, 5))

    return ask


WAYS_IN |= {
    "a bare forward": _within(softhooks.disabled),
    "rows": _within(lambda model: softhooks.rows(model, ["default"])),
    "rows without a prompt": _within(lambda model: softhooks.rows(model, [None])),
}


@pytest.mark.parametrize("asked", WAYS_IN)
def test_whatever_another_thread_asks_meanwhile(asked: str, tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    prompt = softhooks.attach(model, PromptTuning(5))
    prompt.save_pretrained(tmp_path)
    expected = answer(lambda: model(ids).logits)
    for module in (model.model.layers[1], model.lm_head):
        fresh(prompt)
        with Paused(lambda: model(ids).logits, module) as first:
            found = answer(lambda: WAYS_IN[asked](model, prompt, tmp_path))
            assert refused(found), found
            assert prompt.verify_frozen().tensors
            prompt.save_pretrained(tmp_path)
        assert torch.equal(first.result, expected)
        assert list(prompt.prompted_model.prompts) == ["default"]
        assert prompt.is_attached
    assert torch.equal(answer(lambda: model(ids).logits), expected)
    found = answer(lambda: WAYS_IN[asked](model, prompt, tmp_path))  # nothing is in the way any more
    assert not isinstance(found, Exception), found


@pytest.mark.parametrize("first", ["forward", "bare", "stack", "keys and values"])
def test_a_forward_while_another_thread_is_in(first: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    prompt = softhooks.attach(model, PromptTuning(5))

    def bare() -> Tensor:
        with softhooks.disabled(model):
            return model(ids).logits

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(ids).logits,
        "bare": bare,
        "stack": lambda: model.model(ids)[0],
        "keys and values": lambda: prompt.key_values(prompt.prompted_model.structure.entry)["self"].states,
    }
    expected = {name: answer(call) for name, call in calls.items()}
    fresh(prompt)
    with Paused(calls[first], model.model.layers[0]) as running:
        assert running.reached
        for other in calls.values():
            assert refused(answer(other))
    assert torch.equal(running.result, expected[first])
    for name, call in calls.items():
        assert torch.equal(answer(call), expected[name])


@pytest.mark.parametrize("way", ["t5", "bart"])
def test_an_encoder_that_generate_calls_by_itself(way: str) -> None:
    model, ids, other = zoo.build(way, "seq2seq"), zoo.text(2, 6), zoo.text(1, 5, seed=4)
    softhooks.attach(model, PromptTuning(4))
    expected = model.generate(ids, num_beams=2, **NEW)
    encoded = answer(lambda: model.get_encoder()(other)[0])
    decoder = model.get_decoder()
    for module in (model.get_encoder(), decoder):
        with Paused(lambda: model.generate(ids, num_beams=2, **NEW), module) as first:
            assert first.reached
            assert refused(answer(lambda: model.get_encoder()(other)))
            assert refused(answer(lambda: model(input_ids=other, decoder_input_ids=other)))
            assert refused(answer(lambda: model.generate(other, **NEW)))
        assert torch.equal(first.result, expected)
        assert torch.equal(answer(lambda: model.get_encoder()(other)[0]), encoded)


def test_generate_keeps_the_model_between_its_forwards() -> None:
    """No text is lost midway: the second call is refused at its start."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    for name in ("a", "b"):
        softhooks.attach(model, PromptTuning(3), name)

    def generate() -> Tensor:
        with softhooks.rows(model, ["a", "b"]):
            return model.generate(ids, num_beams=3, logits_processor=[process], **NEW)

    def process(_ids: Tensor, scores: Tensor) -> Tensor:
        first.stop()
        return scores

    first = Paused(generate)
    first.reached = True
    expected = generate()
    first.reached = False
    with first:
        assert first.reached
        for other in (
            lambda: model(ids), lambda: model.generate(ids, **NEW), lambda: softhooks.activate(model, "a"),
            lambda: softhooks.attach(model, PromptTuning(2), "c"), model.soft_prompt.prompted_model.prompts["a"].remove,
        ):  # fmt: skip
            assert refused(answer(other))
    assert torch.equal(first.result, expected)


@pytest.mark.parametrize("entry", ["cartridge-distilled", "mpt-taught"])
def test_a_forward_while_an_objective_runs_the_model_a_second_time(entry: str) -> None:
    model, ids = zoo.build("llama").train(), zoo.text(2, 6)
    more = BY_NAME[entry].extra(range(2))
    prompt = BY_NAME[entry].attach(model, 4)
    runs = [0]

    def train() -> Tensor:
        runs[0] = 0
        with torch.enable_grad():
            loss = model(ids, labels=ids, **more).loss
            loss.backward()
        return torch.cat([p.grad.flatten() for p in prompt.parameters() if p.grad is not None])

    def count(*_call: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            runs[0] += 1
            first.stop()

    def again() -> None:
        for parameter in prompt.parameters():
            parameter.grad = None

    expected = train()
    again()
    first = Paused(train)
    handle = model.model.register_forward_hook(count)
    with first:
        assert first.reached
        assert refused(answer(lambda: model(ids, **more)))
    handle.remove()
    assert runs[0] > 1
    assert torch.equal(first.result, expected)


def test_the_embedding_alone_is_the_models_own_meanwhile() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    expected = model.get_input_embeddings()(ids)
    softhooks.attach(model, PromptTuning(3, placement="after_first"))
    with Paused(lambda: model(ids).logits, model.model.layers[0]) as first:
        assert torch.equal(model.get_input_embeddings()(ids), expected)
        wide = zoo.text(1, 9)  # as wide as the other's text with its slots
        assert torch.equal(model.get_input_embeddings()(wide), model.get_input_embeddings().weight[wide])
    assert torch.equal(first.result, answer(lambda: model(ids).logits))


def test_a_layer_that_another_thread_calls_past_the_hooks() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    softhooks.attach(model, PrefixTuning(3))
    with Paused(lambda: model(ids).logits, model.model.layers[0]) as first:
        assert refused(answer(lambda: model.forward(ids)))
    assert torch.equal(first.result, answer(lambda: model(ids).logits))


def test_direct_calls_of_a_models_forward() -> None:
    model, ids, other = zoo.build("llama"), zoo.text(1, 6), zoo.text(1, 6, seed=3)
    softhooks.attach(model, PromptTuning(3))
    route_direct_calls(require_prompted_model(model))
    expected = answer(lambda: model.forward(ids).logits)
    model.register_forward_pre_hook(lambda *_: first.stop())
    first = Paused(lambda: model.forward(ids).logits)
    with first:
        assert refused(answer(lambda: model.forward(other)))
    assert torch.equal(first.result, expected)


# --- attaching --------------------------------------------------------------------------------------------------------


def test_attaching_while_another_thread_runs_the_bare_model() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    expected = answer(lambda: model(ids).logits)
    with Paused(lambda: model(ids).logits, model.model.layers[0]) as first:
        with untouched(model), pytest.raises(UnsupportedModeError, match=REFUSAL):
            softhooks.attach(model, PromptTuning(3))
        with untouched(model), pytest.raises(UnsupportedModeError, match=REFUSAL):
            softhooks.attach(model, PromptTuning(3))
    assert torch.equal(first.result, expected)
    softhooks.attach(model, PromptTuning(3)).remove()


@pytest.mark.parametrize("attached", [0, 1])
def test_a_forward_while_another_thread_attaches(attached: int) -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    for _ in range(attached):
        softhooks.attach(model, PromptTuning(3))
    expected = answer(lambda: model(ids).logits)
    attach = lambda: softhooks.attach(model, PrefixTuning(3), "more")  # noqa: E731
    for module in (model, model.model, model.model.layers[1]):
        with Paused(attach, module) as first:
            assert first.reached
            for asked in (model, model.model):
                assert refused(answer(lambda asked=asked: asked(ids)))
            assert refused(answer(lambda: softhooks.attach(model, PrefixTuning(3), "other")))
        assert list(require_prompted_model(model).prompts)[attached:] == ["more"]
        first.result.remove()
        assert torch.equal(answer(lambda: model(ids).logits), expected)


# --- forwards that have died ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """An exception after which torch runs no hooks."""


@pytest.mark.parametrize("ends", [True, False], ids=["the thread has ended", "the thread lives on"])
@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "cache", "context", "encoder-decoder"])
def test_a_forward_that_died_in_another_thread(way: str, ends: bool) -> None:
    model, prompt, calls = build(way)
    expected = [answer(call) for call in calls]
    for module in list(model.modules())[:12]:
        fresh(prompt)
        died, goes_on = threading.Event(), threading.Event()

        def die(*_call: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise Stop

        def run(died: threading.Event = died, goes_on: threading.Event = goes_on) -> None:
            with contextlib.suppress(Stop):
                calls[0]()
            died.set()
            if not ends:
                goes_on.wait(60)

        handle = module.register_forward_pre_hook(die)
        thread = threading.Thread(target=run)
        thread.start()
        assert died.wait(60)
        if ends:
            thread.join()
        for call, right in zip(calls, expected, strict=True):
            assert torch.equal(answer(call), right)
        handle.remove()
        goes_on.set()
        thread.join()


@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "context", "the stack itself"])
def test_a_stack_called_by_itself_after_a_forward_that_died(way: str) -> None:
    """The arguments of the dead forward are not reused."""
    model, _, calls = build(way)
    expected = answer(calls[1])

    def die(*_call: Any) -> None:
        raise Stop

    stack = model if way == "the stack itself" else model.model
    states = answer(lambda: stack(zoo.text(1, 4))[0])
    for module in (stack, stack.layers[0]):
        handle = module.register_forward_pre_hook(die)
        with pytest.raises(Stop):
            calls[0]()
        handle.remove()
        assert torch.equal(answer(lambda: stack(zoo.text(1, 4))[0]), states)
        assert torch.equal(answer(calls[1]), expected)


def test_an_error_before_our_hooks_ends_nobody_elses_forward() -> None:
    """Another hook raises before ours: torch still calls our last hook, inside another forward of the thread."""
    model, ids = zoo.build("llama"), zoo.text(1, 6)

    def fail(*_call: Any) -> None:
        if fails[0]:
            raise KeyError

    fails, model.fail = [False], fail
    model.register_forward_pre_hook(fail)
    model.model.register_forward_pre_hook(fail)
    softhooks.attach(model, PromptTuning(3))
    expected = answer(lambda: model(ids).logits)

    def nested(*_call: Any) -> None:
        fails[0] = True
        for asked in (model, model.model):
            with pytest.raises(KeyError):
                asked(ids)
        fails[0] = False

    for module in (model.model.layers[0], model.lm_head):
        handle = module.register_forward_hook(nested)
        assert torch.equal(answer(lambda: model(ids).logits), expected)
        handle.remove()


# --- one thread -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", CASES)
def test_a_forward_inside_another_one_of_the_same_thread(way: str) -> None:
    """From a hook anywhere in the model, also while the prompt itself is computed."""
    model, prompt, calls = build(way)
    expected = [answer(call) for call in calls]
    with softhooks.disabled(model):
        bare = answer(calls[1])
    inside: list[Any] = []

    def nested(*_call: Any) -> None:
        if not busy[0]:
            busy[0] = True
            inside.append(answer(calls[1]))
            with softhooks.disabled(model):
                inside.append(answer(calls[1]))
            busy[0] = False

    busy = [False]
    for module in list(model.modules()):
        fresh(prompt)
        handle = module.register_forward_hook(nested)
        found = answer(calls[0])
        assert torch.equal(found, expected[0]), (type(module), found)
        handle.remove()
    assert len(inside) > 10
    assert all(
        torch.equal(found, right) for found, right in zip(inside, [expected[1], bare] * len(inside), strict=False)
    )


def test_generate_inside_a_hook() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    for name in ("a", "b"):
        softhooks.attach(model, PromptTuning(3), name)
    with softhooks.rows(model, ["a", "b"]):
        logits = answer(lambda: model(ids).logits)
        texts = model.generate(ids, num_beams=2, **NEW)
        found: list[Tensor] = []

        def nested(*_call: Any) -> None:
            handle.remove()
            found.append(model.generate(ids, num_beams=2, **NEW))

        for module in (model.model.layers[0], model.lm_head):
            handle = module.register_forward_hook(nested)
            assert torch.equal(answer(lambda: model(ids).logits), logits)
            handle = module.register_forward_hook(nested)
            assert torch.equal(model.generate(ids, num_beams=2, **NEW), texts)
    assert len(found) == 4
    assert all(torch.equal(one, texts) for one in found)


@pytest.mark.parametrize("way", ["shared", "context"])
def test_a_compiled_model(way: str) -> None:
    """Its hooks know their forward by the frame that calls them, which compiled code has too."""
    torch._dynamo.reset()
    model, prompt, _ = build(way)
    compiled = torch.compile(model, backend="eager")
    first, second = CASES[way][3:]
    expected = [answer(lambda call=call: model(**call).logits) for call in (first, second)]
    with softhooks.disabled(model):
        bare = answer(lambda: model(**first).logits)
        torch.testing.assert_close(answer(lambda: compiled(**first).logits), bare)
    torch.testing.assert_close(answer(lambda: compiled(**first).logits), expected[0])
    choose = prompt.encoder.choose_variants
    prompt.encoder.choose_variants = lambda *given: running.stop() or choose(*given)
    running = Paused(lambda: compiled(**first).logits)
    with running:
        assert running.reached
        assert refused(answer(lambda: compiled(**second)))
        assert refused(answer(lambda: model(**second)))
    torch.testing.assert_close(running.result, expected[0])
    torch.testing.assert_close(answer(lambda: compiled(**second).logits), expected[1])
    assert prompt.prompted_model.running._innermost is None
    torch._dynamo.reset()


# --- backward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "context"])
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
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for parameter in parameters:
        parameter.grad = None
    model.zero_grad()
    loss = calls[0]().square().sum()
    softhooks.activate(model, "other")
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for ours, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_a_backward_that_runs_layers_again_while_another_thread_is_in_a_forward() -> None:
    model, prompt, calls = build("prefix")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = answer(calls[1])
    loss = calls[0]().square().sum()
    with Paused(calls[1], model.model.layers[0]) as first, pytest.raises(UnsupportedModeError, match=REFUSAL):
        loss.backward(retain_graph=True)
    assert torch.equal(first.result, expected)
    calls[0]().square().sum().backward()
    assert all(p.grad is not None for p in prompt.encoder.parameters())


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
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
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
    assert require_prompted_model(model).running._innermost is None


# --- without any order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "context", "encoder-decoder"])
def test_many_threads(way: str, locked: bool) -> None:
    _, prompt, calls = build(way)
    expected = [answer(call) for call in calls]
    lock = threading.Lock()
    found: list[list[Any]] = [[], []]

    def run(number: int) -> None:
        for _ in range(12):
            if locked:
                with lock:
                    found[number].append(answer(calls[number]))
            else:
                found[number].append(answer(calls[number]))

    threads = [threading.Thread(target=run, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            if isinstance(result, Exception) and not (refused(result) and not locked):
                raise result  # with its traceback
            assert isinstance(result, Exception) or torch.equal(result, right)
    assert torch.equal(answer(calls[0]), expected[0])
    prompt.remove()


def test_a_model_for_each_thread() -> None:
    """They share the attention functions of transformers, which are wrapped while a prompt is on anywhere."""
    found: dict[int, list[Any]] = {}

    def run(number: int) -> None:
        model, ids = models[number], zoo.text(1, 6, seed=number)
        results: list[Any] = []
        for _ in range(4):
            prompt = answer(lambda: softhooks.attach(model, PrefixTuning(3)))
            results.append(prompt if isinstance(prompt, Exception) else answer(lambda: model(ids).logits).shape)
            prompt.remove()
            results.append(answer(lambda: model(ids).logits))
        found[number] = results

    models = [zoo.build("llama", seed=seed) for seed in range(3)]
    bare = [answer(lambda m=model, n=n: m(zoo.text(1, 6, seed=n)).logits) for n, model in enumerate(models)]
    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        assert results[::2] == [bare[number].shape] * 4
        assert all(torch.equal(result, bare[number]) for result in results[1::2])


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_what_runs_is_not_copied() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    softhooks.attach(model, PrefixTuning(3))
    running = require_prompted_model(model).running
    with running.exclusive("a test"):
        for other in (copy.deepcopy(running), pickle.loads(pickle.dumps(running))):
            assert isinstance(other, RunningCalls)
            assert other.call is None
        with softhooks.disabled(model):
            twin = copy.deepcopy(model)
        assert torch.equal(answer(lambda: twin(ids).logits), answer(lambda: model(ids).logits))


def test_nothing_is_held_after_a_forward() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    softhooks.attach(model, PromptTuning(3))
    model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 3), zoo.VOCABULARY + 5))
    model.generate(ids, **NEW)
    assert require_prompted_model(model).running._innermost is None
    assert all(stack.state._current is None for stack in require_prompted_model(model).structure.stacks)
