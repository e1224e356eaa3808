"""Which prompts the unfinished requests of a continuous batch still need, and which requests share blocks."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import untouched
from test_request_prompts import alone, assert_same, config, greedy, prompted, running, served

import softhooks
from softhooks.runtime import request_prompts
from softhooks.runtime.request_prompts import RequestPrompts, is_waited_for

TEXT = [5, 6, 7]


@pytest.fixture(autouse=True)
def _no_prompt_before() -> None:
    untouched.remove_all()


def idle(model: Any) -> Any:
    """A manager that does not run, so that requests wait in its queue."""
    return model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=config())


def requests_of(manager: Any) -> RequestPrompts:
    found: RequestPrompts = manager._softhooks_requests
    return found


def test_a_cancelled_request_no_longer_needs_its_prompt() -> None:
    model = prompted()
    manager = idle(model)
    with softhooks.rows(model, ["b"]):
        name = manager.add_request(TEXT)
    assert is_waited_for(manager, "b")
    assert not is_waited_for(manager, "a")
    manager.cancel_request(name)
    assert not is_waited_for(manager, "b")
    manager.destroy()


def test_a_running_request_that_is_cancelled_no_longer_needs_its_prompt() -> None:
    model = prompted()
    with running(model) as manager:
        with softhooks.rows(model, ["b"]):
            name = manager.add_request(TEXT, max_new_tokens=60)
        manager.cancel_request(name)
        assert not is_waited_for(manager, "b")


def test_a_request_that_does_not_fit_into_the_queue_needs_no_prompt() -> None:
    model = prompted()
    manager = idle(model)
    requests = requests_of(manager)

    def put(_state: Any) -> None:
        raise queue.Full

    assert requests.default == "c"
    with pytest.raises(queue.Full):
        requests._put(put, SimpleNamespace(request_id="x", logit_processor_kwargs={}))
    assert not is_waited_for(manager, "c")
    manager.destroy()


def test_a_cancelled_request_in_a_batch_runs_on_without_its_removed_prompt() -> None:
    model = prompted()
    manager = idle(model)
    requests = requests_of(manager)
    with softhooks.rows(model, ["b"]):
        name = manager.add_request(TEXT)
    state = manager.input_queue.get()
    scheduler = SimpleNamespace(active_requests={name: state}, waiting_requests={})
    processor, batch = SimpleNamespace(scheduler=scheduler), [SimpleNamespace(state=state)]
    assert requests.is_waited_for(processor, "b")
    manager.cancel_request(name)
    assert not requests.is_waited_for(processor, "b")
    assert requests._without_cancelled(batch, ["b"], scheduler) == ["b"]
    softhooks.prompt.soft_prompts_of(requests.prompted)["b"].remove()
    assert requests._without_cancelled(batch, ["b"], scheduler) == [None]
    scheduler.active_requests.clear()
    assert requests._without_cancelled([], [], scheduler) == []
    assert not requests._cancelled
    manager.destroy()


def test_requests_that_threads_add_at_once_keep_their_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread stops while it adds its request, after its prompt was chosen."""
    model, stopped, goes_on = prompted(), threading.Event(), threading.Event()
    manager = idle(model)
    manager.destroy()
    add = type(manager).add_request

    def add_slowly(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is thread:
            stopped.set()
            assert goes_on.wait(300)
        return add(*args, **kwargs)

    def add_first() -> None:
        with softhooks.rows(model, ["a"]):
            manager.add_request(TEXT, request_id="first")

    monkeypatch.setattr(type(manager), "add_request", add_slowly)
    manager, thread = idle(model), threading.Thread(target=add_first)
    thread.start()
    assert stopped.wait(300)
    with softhooks.rows(model, ["b"]):
        manager.add_request(TEXT, request_id="second")
    goes_on.set()
    thread.join()
    states = [manager.input_queue.get() for _ in range(2)]
    assert {state.request_id: requests_of(manager).name_of(state) for state in states} == {"first": "a", "second": "b"}
    manager.destroy()


def test_with_too_many_prompts_blocks_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_prompts, "_MOST_SALTS", 2)
    model, text, names = prompted(), list(range(5, 31)), ["a", "b", None, "c", "b"]
    salts: set[int | None] = set()
    salt = RequestPrompts._salt

    def noted(self: RequestPrompts, state: Any) -> int | None:
        salts.add(salt(self, state))
        return salt(self, state)

    monkeypatch.setattr(RequestPrompts, "_salt", noted)
    expected = alone(model, [text] * 5, names)
    with softhooks.rows(model, names):
        assert_same(served(model, [text] * 5, allow_block_sharing=True), expected)
    assert salts == {0, 1, 2, None}
