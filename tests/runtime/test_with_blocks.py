"""`rows` and `disabled` apply to their own thread and asyncio task, and only inside their block."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import Layout, PrefixTuning, PromptTuning, PTuning, UnsupportedModeError
from softhooks.trainer.reference_policy import Reference

IDS = zoo.text(1, 6)
NEW = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": zoo.PAD}
NAMES = ("a", "b", "c", None)

Enter = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def prompted() -> Iterator[tuple[Any, dict[str | None, Tensor]]]:
    """A model with three prompts, "a" on, and its logits with each and with none."""
    remove_all()
    model = zoo.build("llama")
    logits: dict[str | None, Tensor] = {None: bare(model)}
    softhooks.attach(model, PromptTuning(3), "a")
    softhooks.attach(model, PrefixTuning(2), "b")
    softhooks.attach(model, PromptTuning(4, placement="after_first"), "c")
    for name in ("c", "b", "a"):
        softhooks.activate(model, name)
        logits[name] = bare(model)
    yield model, logits
    remove_all()


@pytest.fixture(autouse=True)
def _no_prompt_left() -> None:
    """Skip the garbage collection after each test, because the model is kept."""


def bare(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def on(prompted: tuple[Any, dict[str | None, Tensor]]) -> str | None:
    """The name of the prompt that the output belongs to."""
    model, logits = prompted
    now = bare(model)
    (name,) = [name for name, expected in logits.items() if torch.allclose(now, expected, rtol=1e-4, atol=1e-5)]
    return name


def named(model: Any, name: str | None) -> AbstractContextManager[Any]:
    return softhooks.disabled(model) if name is None else softhooks.rows(model, [name])


@pytest.mark.parametrize("name", ["b", "c", None])
def test_a_block_in_another_thread(prompted: Any, name: str | None) -> None:
    inside, done = threading.Event(), threading.Event()
    found: list[str | None] = []

    def other() -> None:
        with named(prompted[0], name):
            found.append(on(prompted))
            inside.set()
            assert done.wait(60)
            found.append(on(prompted))
        found.append(on(prompted))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    assert on(prompted) == "a"
    with named(prompted[0], "c"):
        assert on(prompted) == "c"
    done.set()
    thread.join()
    assert found == [name, name, "a"]


def test_a_thread_that_is_started_inside(prompted: Any) -> None:
    """A new thread starts with an empty context; in a copied context the block applies."""
    with named(prompted[0], "b"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(on, prompted).result() == "a"
        assert pool.submit(contextvars.copy_context().run, on, prompted).result() == "b"
        assert pool.submit(on, prompted).result() == "a"


def test_tasks_that_take_turns(prompted: Any) -> None:
    async def work(name: str | None, turns: int) -> list[str | None]:
        found = []
        for _ in range(turns):
            with named(prompted[0], name):
                await asyncio.sleep(0)
                found.append(on(prompted))
                await asyncio.sleep(0)
                found.append(on(prompted))
            await asyncio.sleep(0)
            found.append(on(prompted))
        return found

    async def main() -> list[list[str | None]]:
        return await asyncio.gather(*[work(name, 2 + number) for number, name in enumerate(NAMES)])

    for number, (name, found) in enumerate(zip(NAMES, asyncio.run(main()), strict=True)):
        assert found == [name, name, "a"] * (2 + number)
    assert on(prompted) == "a"


def test_tasks_that_generate_with_their_own_rows(prompted: Any) -> None:
    model = prompted[0]

    async def work(names: list[str | None]) -> Tensor:
        with softhooks.rows(model, names):
            await asyncio.sleep(0)
            found = model.generate(zoo.text(2, 5), num_beams=2, **NEW)
            await asyncio.sleep(0)
            return found

    async def main() -> list[Tensor]:
        return await asyncio.gather(work(["a", "b"]), work(["b", "a"]), work([None, "a"]))

    for names, found in zip((["a", "b"], ["b", "a"], [None, "a"]), asyncio.run(main()), strict=True):
        with softhooks.rows(model, names):
            assert torch.equal(found, model.generate(zoo.text(2, 5), num_beams=2, **NEW))


def test_what_a_task_inherits(prompted: Any) -> None:
    async def child() -> list[str | None]:
        found = [on(prompted)]
        await asyncio.sleep(0)
        with named(prompted[0], "c"):
            found.append(on(prompted))
        found.append(on(prompted))
        return found

    async def main() -> None:
        with named(prompted[0], "b"):
            assert await asyncio.to_thread(on, prompted) == "b"
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
            assert on(prompted) == "b"
        assert on(prompted) == "a"
        assert await task == ["b", "c", "b"]
        assert await asyncio.to_thread(on, prompted) == "a"

    asyncio.run(main())
    assert on(prompted) == "a"


def test_a_task_that_is_canceled(prompted: Any) -> None:
    after: list[str | None] = []

    async def work() -> None:
        try:
            with named(prompted[0], "b"), named(prompted[0], None):
                await asyncio.sleep(60)
        finally:
            after.append(on(prompted))

    async def main() -> None:
        with named(prompted[0], "c"):
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            assert on(prompted) == "c"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert on(prompted) == "c"

    asyncio.run(main())
    assert after == ["c"]
    assert on(prompted) == "a"


def test_a_copied_context_outlives_the_block(prompted: Any) -> None:
    with named(prompted[0], "b"):
        context = contextvars.copy_context()
    assert on(prompted) == "a"
    assert context.run(on, prompted) == "b"
    assert on(prompted) == "a"


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), st.data())
def test_blocks_that_are_left_in_any_order(prompted: Any, names: list[str | None], data: Any) -> None:
    """As generators may do. The innermost open block applies; inside `disabled` nothing is on."""
    blocks = [(name, named(prompted[0], name)) for name in names]
    for _, block in blocks:
        block.__enter__()
    while blocks:
        open_names = [name for name, _ in blocks]
        assert on(prompted) == (None if None in open_names else open_names[-1])
        blocks.pop(data.draw(st.integers(0, len(blocks) - 1)))[1].__exit__(None, None, None)
    assert on(prompted) == "a"


def test_generators_that_are_suspended_inside(prompted: Any) -> None:
    def answers(name: str) -> Iterator[str | None]:
        with named(prompted[0], name):
            while True:
                yield on(prompted)

    first, second = answers("b"), answers("c")
    assert next(first) == "b"
    assert next(second) == "c"
    first.close()
    assert on(prompted) == "c"  # as Python has it: a generator shares the context of who resumes it
    second.close()
    assert on(prompted) == "a"


def test_a_generator_that_is_closed_in_another_thread(prompted: Any) -> None:
    def answers() -> Iterator[str | None]:
        with named(prompted[0], "b"):
            yield on(prompted)

    for other in (lambda call: call(), lambda call: contextvars.copy_context().run(call)):
        generator = answers()
        assert next(generator) == "b"
        thread = threading.Thread(target=other, args=(generator.close,))
        thread.start()
        thread.join()
        assert on(prompted) == "a"
    generator = answers()
    assert next(generator) == "b"
    contextvars.copy_context().run(generator.close)
    assert on(prompted) == "a"


def test_an_exit_stack_and_an_error(prompted: Any) -> None:
    with ExitStack() as stack:
        stack.enter_context(named(prompted[0], "b"))
        stack.enter_context(named(prompted[0], None))
        assert on(prompted) is None
    assert on(prompted) == "a"
    with pytest.raises(KeyboardInterrupt), named(prompted[0], "b"), named(prompted[0], "c"):
        raise KeyboardInterrupt
    assert on(prompted) == "a"


def test_a_block_is_of_one_model(prompted: Any) -> None:
    other = zoo.build("llama")
    expected = bare(other)
    with softhooks.attach(other, PromptTuning(3), "a"):
        with softhooks.disabled(other):
            assert on(prompted) == "a"
            with named(prompted[0], None):
                assert torch.equal(bare(other), expected)
            assert torch.equal(bare(other), expected)
        assert not torch.equal(bare(other), expected)


def test_a_reference_in_another_thread(prompted: Any) -> None:
    """It has one prompt on, or none, for its own forward; other threads use the model's active prompt."""
    model, logits = prompted
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    seen: list[str | None] = []

    def look(*_call: Any) -> None:
        seen.append(softhooks.runtime.prompted_model.require_prompted_model(model).active)

    with ThreadPoolExecutor(1) as pool, torch.no_grad(), named(model, None):
        handle = model.lm_head.register_forward_pre_hook(lambda *_: pool.submit(look).result())
        assert torch.allclose(Reference(model, "b")(IDS).logits, logits["b"], rtol=1e-4, atol=1e-5)
        handle.remove()
    assert seen == ["a"]
    assert torch.equal(Reference(model)(IDS).logits, logits[None])
    assert on(prompted) == "a"


# --- generate ---------------------------------------------------------------------------------------------------------


def test_repeats_belong_to_their_generate(prompted: Any) -> None:
    """A block inside a hook of `generate` starts with its own batch size, independent of the beams."""
    model, ids = prompted[0], zoo.text(2, 6)
    refusals: list[Exception] = []

    def look(*_call: Any) -> None:
        with (
            softhooks.rows(model, ["a", "b"]),
            pytest.raises(UnsupportedModeError, match="one prompt for each row") as e,
        ):
            model(zoo.text(6, 4))
        refusals.append(e.value)

    with softhooks.rows(model, ["b", "a"]):
        expected = model.generate(ids, num_beams=3, **NEW)
        handle = model.lm_head.register_forward_hook(look)
        assert torch.equal(model.generate(ids, num_beams=3, **NEW), expected)
        handle.remove()
        with pytest.raises(UnsupportedModeError, match="one prompt for each row"):
            model(zoo.text(6, 4))
    assert len(refusals) == 3


def test_the_generate_of_the_class(prompted: Any) -> None:
    model, ids = prompted[0], zoo.text(2, 6)
    with softhooks.rows(model, ["b", "a"]):
        with pytest.raises(UnsupportedModeError, match=r"Call `model.generate"):
            type(model).generate(model, ids, num_beams=3, **NEW)
        assert model.generate(ids, num_beams=3, **NEW).shape == (2, 9)
    assert torch.equal(type(model).generate(model, ids, **NEW), model.generate(ids, **NEW))


def test_two_generates_that_take_turns_with_a_layout_that_searches() -> None:
    """Where a prompt ends is known to its own `generate`, whatever another thread generates between two of its steps."""
    remove_all()
    model = zoo.build("llama")
    softhooks.attach(model, PTuning(layout=Layout.insert(after={9: 1}, missing="skip"), encoder="none"))
    short, long = torch.tensor([[5, 9, 6]]), torch.tensor([[5, 9, 6, 7, 9, 8, 5]])
    options: dict[str, Any] = {**NEW, "use_cache": False, "max_new_tokens": 5}
    expected = [model.generate(ids, **options) for ids in (short, long)]
    results: list[Any] = []

    def other() -> None:
        try:
            results.append(model.generate(long, **options))
        except UnsupportedModeError as error:
            results.append(error)

    def process(_ids: Tensor, scores: Tensor) -> Tensor:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return scores

    assert torch.equal(model.generate(short, logits_processor=[process], **options), expected[0])
    assert len(results) == 5
    assert all(isinstance(result, UnsupportedModeError) or torch.equal(result, expected[1]) for result in results)
    remove_all()
