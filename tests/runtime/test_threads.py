"""Threads that run forwards and generations on one model with prompts at once: each result is that of a single thread."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import zoo
from paused import Paused, answer
from thread_cases import CASES, Crowd, attach, build, model_of
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptNotReachedError, PromptTuning
from softhooks.runtime.direct_forward import route_direct_calls
from softhooks.runtime.prompted_model import require_prompted_model

NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": zoo.PAD}
THREADS, ROUNDS = 16, 4
Context = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def _threads_switch_often() -> Iterator[None]:
    remove_all()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    remove_all()


# --- two forwards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", CASES)
def test_a_forward_while_another_one_stands_anywhere(way: str) -> None:
    """Stop before and after every module of the model: in the prompt's own run, between two hooks, in the head."""
    model, prompt, calls = build(way)
    bare_context = lambda: softhooks.disabled(model)  # noqa: E731
    with bare_context():
        bare = answer(calls[1]) if "prompt_context" not in CASES[way][4] and "task_ids" not in CASES[way][4] else None
    expected = [answer(call) for call in calls]
    assert not torch.equal(*expected)
    overlaps = 0
    for number, module in enumerate(list(model.modules())):
        with Paused(calls[0], module, before=bool(number % 2)) as first:
            second = answer(calls[1])
            if bare is not None:
                with bare_context():
                    assert torch.equal(answer(calls[1]), bare)
        overlaps += first.reached
        assert torch.equal(first.result, expected[0]), (type(module), first.result)
        assert torch.equal(second, expected[1]), (type(module), second)
    assert overlaps > 10
    prompt.remove()


def test_a_layer_that_another_thread_calls_past_the_hooks() -> None:
    """The prompt that the first thread is using does not enter it, and it is refused as it is without other threads."""
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    softhooks.attach(model, PrefixTuning(3))
    states = torch.zeros(1, 6, 32)
    angles = model.model.rotary_emb(states, torch.arange(6)[None])
    with Paused(lambda: model(ids).logits, model.model.layers[0]) as first:
        assert isinstance(
            answer(lambda: model.model.layers[1](states, position_embeddings=angles)), PromptNotReachedError
        )
    assert torch.equal(first.result, answer(lambda: model(ids).logits))


def test_direct_calls_of_a_models_forward() -> None:
    model, calls = zoo.build("llama"), [zoo.text(1, 6), zoo.text(1, 6, seed=3)]
    softhooks.attach(model, PromptTuning(3))
    route_direct_calls(require_prompted_model(model))
    expected = [answer(lambda ids=ids: model.forward(ids).logits) for ids in calls]
    model.register_forward_pre_hook(lambda *_: first.stop())
    first = Paused(lambda: model.forward(calls[0]).logits)
    with first:
        assert torch.equal(answer(lambda: model.forward(calls[1]).logits), expected[1])
    assert torch.equal(first.result, expected[0])


def test_the_embedding_alone_is_the_models_own_meanwhile() -> None:
    model, ids = zoo.build("llama"), zoo.text(1, 6)
    expected = model.get_input_embeddings()(ids)
    softhooks.attach(model, PromptTuning(3, placement="after_first"))
    with Paused(lambda: model(ids).logits, model.model.layers[0]) as first:
        assert torch.equal(model.get_input_embeddings()(ids), expected)
        wide = zoo.text(1, 9)  # as wide as the other's text with its slots
        assert torch.equal(model.get_input_embeddings()(wide), model.get_input_embeddings().weight[wide])
    assert torch.equal(first.result, answer(lambda: model(ids).logits))


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
        torch.testing.assert_close(answer(lambda: compiled(**second).logits), expected[1])
        torch.testing.assert_close(answer(lambda: model(**second).logits), expected[1])
    torch.testing.assert_close(running.result, expected[0])
    torch.testing.assert_close(answer(lambda: compiled(**second).logits), expected[1])
    assert prompt.prompted_model.running.call is None
    torch._dynamo.reset()


# --- many requests ----------------------------------------------------------------------------------------------------


def requests_of(model: Any, way: str) -> list[Callable[[], Tensor]]:
    """Sixty-four calls that differ in their prompts, rows, columns, texts and gradients."""
    *_, call, other = CASES[way]
    columns = {key: torch.cat([call[key], other[key]]) for key in ("task_ids", "prompt_context") if key in call}
    contexts: list[Context] = [
        lambda: softhooks.rows(model, ["a", "b"]), nullcontext, lambda: softhooks.rows(model, ["b", "b"]),
        lambda: softhooks.rows(model, [None, "a"]), lambda: softhooks.rows(model, ["b", "a"]),
    ]  # fmt: skip

    def request(number: int) -> Tensor:
        ids, shorter = zoo.text(2, 4 + number % 4, seed=number), number % 3 == 0
        mask = torch.ones_like(ids)
        mask[1, -1] = 0 if shorter else 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {key: value.flip(0) if number % 2 else value for key, value in columns.items()}
        inputs |= {"decoder_input_ids": ids.flip(1)} if "decoder_input_ids" in call else {}
        # The context is entered around the whole request, as in a server.
        with contexts[number % len(contexts)](), torch.set_grad_enabled(number % 4 == 1):
            return zoo.main_output(model(**inputs)).detach()

    return [lambda number=number: request(number) for number in range(THREADS * ROUNDS)]


@pytest.mark.parametrize("way", CASES)
def test_sixty_four_requests_of_sixteen_threads(way: str) -> None:
    model = model_of(way)
    for name in ("b", "a"):
        attach(model, way, name)
    requests = requests_of(model, way)
    expected = [request() for request in requests]
    # A module that each request calls once or more, after the hooks have begun its forward.
    stack = require_prompted_model(model).structure.stacks[-1]
    crowd = Crowd(stack.sites[0].module if stack.sites else stack.embedding, THREADS)
    found = crowd.run([requests[start : start + THREADS] for start in range(0, len(requests), THREADS)])
    for number, (result, right) in enumerate(zip((one for each in found for one in each), expected, strict=True)):
        if isinstance(result, Exception):
            raise result
        assert torch.equal(result, right), number
    assert crowd.meetings == ROUNDS
    assert torch.equal(requests[0](), expected[0])
    prompts = list(require_prompted_model(model).prompts.values())
    for prompt in prompts:
        prompt.remove()  # type: ignore[attr-defined]


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("way", ["shared", "slots", "prefix", "cache", "scaled layers", "head"])
def test_requests_with_and_without_a_prompt(way: str, disabled: bool) -> None:
    model, *_ = build(way)
    expected = []

    def request(number: int) -> Tensor:
        off = bool(number % 2) == disabled
        with softhooks.disabled(model) if off else nullcontext(), torch.no_grad():
            return zoo.main_output(model(zoo.text(1, 5, seed=number)))

    expected = [request(number) for number in range(8)]
    crowd = Crowd(require_prompted_model(model).structure.entry.embedding, 8)
    (found,) = crowd.run([[lambda number=number: request(number) for number in range(8)]])
    assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True)), found


GENERATED: dict[str, dict[str, Any]] = {
    "shared": {"num_beams": 2}, "slots": {}, "prefix": {}, "cache": {}, "scaled layers": {}, "encoder-decoder": {},
    "prefixes of an encoder-decoder": {"num_beams": 2},
}  # fmt: skip


@pytest.mark.parametrize("way", GENERATED)
def test_generations_of_eight_threads(way: str) -> None:
    """They stand between their forwards at once, where a generation has no forward that could keep its state."""
    model = model_of(way)
    for name in ("b", "a"):
        attach(model, way, name)
    meets = threading.local()

    def request(number: int) -> Tensor:
        meets.comes = number >= 0
        names = [["a", "b"], ["b", None], ["b", "b"], ["b", "a"]][number % 4]
        with softhooks.rows(model, names):
            return model.generate(zoo.text(2, 4 + number % 3, seed=number), logits_processor=[process], **options)

    def process(_ids: Tensor, scores: Tensor) -> Tensor:
        if getattr(meets, "comes", False) and barrier:
            meets.comes = False
            barrier[0].wait()
        return scores

    options, barrier = {**NEW, **GENERATED[way]}, list[threading.Barrier]()
    expected = [request(number) for number in range(8)]
    barrier.append(threading.Barrier(8, timeout=300))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(request, range(8)))
    assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("way", ["t5", "bart"])
def test_an_encoder_that_generate_calls_by_itself(way: str) -> None:
    model, ids, other = zoo.build(way, "seq2seq"), zoo.text(2, 6), zoo.text(1, 5, seed=4)
    softhooks.attach(model, PromptTuning(4))
    calls: list[Callable[[], Tensor]] = [
        lambda: model.get_encoder()(other)[0],
        lambda: model(input_ids=other, decoder_input_ids=other).logits,
        lambda: model.generate(other, **NEW),
    ]
    expected, right = model.generate(ids, num_beams=2, **NEW), [answer(call) for call in calls]
    for module in (model.get_encoder(), model.get_decoder()):
        with Paused(lambda: model.generate(ids, num_beams=2, **NEW), module) as first:
            assert first.reached
            for call, result in zip(calls, right, strict=True):
                assert torch.equal(answer(call), result)
        assert torch.equal(first.result, expected)


# --- asyncio ----------------------------------------------------------------------------------------------------------


def test_tasks_that_run_the_model_in_threads() -> None:
    """A task hands its `rows` to `asyncio.to_thread`; all of them stand in the model at once."""
    model = zoo.build("llama")
    for name in ("b", "a"):
        attach(model, "shared", name)
    names = [["a"], ["b"], [None], ["b"]]

    def run(number: int) -> Tensor:
        return answer(lambda: model(zoo.text(1, 5, seed=number)).logits)

    def meet(*_call: Any) -> None:
        if not getattr(own, "came", False):
            own.came = True
            barrier.wait()

    async def task(number: int) -> Tensor:
        with softhooks.rows(model, names[number]):
            await asyncio.sleep(0)
            return await asyncio.to_thread(run, number)

    async def main() -> list[Tensor]:
        return await asyncio.gather(*map(task, range(4)))

    expected = []
    for number, each in enumerate(names):
        with softhooks.rows(model, each):
            expected.append(run(number))
    own, barrier = threading.local(), threading.Barrier(4, timeout=300)
    handle = model.model.layers[1].register_forward_pre_hook(meet)
    found = asyncio.run(main())
    handle.remove()
    assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True)), found


def test_a_context_that_was_copied_inside_a_forward() -> None:
    """What a forward is doing is not part of the context: a task that is started in a hook begins its own forwards."""
    model, calls = build("slots")[::2]
    expected = [answer(call) for call in calls]
    copied: list[contextvars.Context] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: copied.append(contextvars.copy_context()))
    with Paused(calls[0], model.model.layers[1]) as first:
        assert torch.equal(copied[0].run(answer, calls[1]), expected[1])
    handle.remove()
    assert torch.equal(first.result, expected[0])
    assert torch.equal(copied[0].run(answer, calls[1]), expected[1])
    table = model.get_input_embeddings()
    assert torch.equal(copied[0].run(table, zoo.text(1, 9)), table.weight[zoo.text(1, 9)])


# --- several models ---------------------------------------------------------------------------------------------------


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


def test_nothing_stays_on_the_model() -> None:
    """Neither a forward nor an error in one changes the model while the prompt is attached."""
    model, prompt, calls = build("prefixes of an encoder-decoder")
    with untouched(model):
        for call in calls:
            answer(call)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 3), zoo.VOCABULARY + 5), decoder_input_ids=zoo.text(1, 3))
    assert prompt.prompted_model.running.call is None
    assert all(stack.state.current is None for stack in prompt.structure.stacks)
