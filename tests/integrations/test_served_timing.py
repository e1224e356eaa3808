"""Requests to `transformers serve` at the moments that matter: threads are stopped there, so that each test has one order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import served

from softhooks import PromptStore

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

BATCHES: dict[str, Any] = {"continuous_batching": True, "cb_num_blocks": 64, "cb_max_batch_tokens": 64}
TEXT = "word5 word6 word7"
PATIENCE = 300


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    return served.write(tmp_path, {name: served.METHODS[name] for name in ("en", "de")})


@pytest.fixture
def start(tmp_path: Path, store: PromptStore) -> Iterator[Callable[..., served.Client]]:
    """Start a server with the prompts of the store; it has answered one request."""
    made: list[served.Client] = []

    def started(**options: Any) -> served.Client:
        made.append(served.Client(tmp_path, store=store.folder, **options))
        made[0].complete("en", TEXT)
        return made[0]

    yield started
    made[0].stop()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_prompt_is_unloaded_after_the_requests_that_were_made_before(
    start: Callable[..., served.Client], tmp_path: Path
) -> None:
    [expected] = served.answers(tmp_path, [("de", TEXT)])
    client = start()
    state, goes_on = client.server._generation_state, threading.Event()
    manager = state.get_manager(client.base)
    queue = manager._thread._queue
    [prompts] = [
        cell.cell_contents for cell in type(manager).submit.__closure__ if hasattr(cell.cell_contents, "turns")
    ]
    with ThreadPoolExecutor(2) as pool:
        try:
            manager.submit(goes_on.wait, PATIENCE)  # occupies the thread that generates, and the model
            wait_until(queue.empty)
            asked = pool.submit(client.complete, "de", TEXT)
            wait_until(lambda: queue.qsize() == 1)
            unloaded = pool.submit(client.post, "/v1/unload_soft_prompt", prompt_name="de")
            # It waits in the queue, behind the request; otherwise it would wait for the model, before the request.
            wait_until(lambda: queue.qsize() == 2 or prompts.turns._next - prompts.turns._now == 2)
        finally:
            goes_on.set()
        assert asked.result() == expected
        assert unloaded.result().status_code == 200


def test_a_stream_whose_answer_is_complete_before_it_has_a_handler(
    start: Callable[..., served.Client], tmp_path: Path
) -> None:
    """transformers registers the handler of a stream only after it has added the request."""
    [expected] = served.answers(tmp_path, [("de", TEXT)])
    client = start(**BATCHES)
    batches = client.server._generation_state._cb_manager._cb
    router, add, complete = batches.output_router, batches.add_request, threading.Event()

    def add_and_wait(*args: Any, **kwargs: Any) -> Any:
        name = add(*args, **kwargs)
        assert complete.wait(PATIENCE)
        assert router.output_queue.empty()  # no stream reads this queue
        return name

    def noticing(deliver: Callable[..., None]) -> Callable[..., None]:
        def delivered(given: Any) -> None:
            deliver(given)
            if any(output.is_finished() for output in (given if isinstance(given, list) else [given])):
                complete.set()

        return delivered

    batches.add_request = add_and_wait
    router.deliver, router.deliver_batch = noticing(router.deliver), noticing(router.deliver_batch)
    assert client.complete("de", TEXT, stream=True).split() == expected.split()
