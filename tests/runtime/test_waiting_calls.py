"""The order in which calls that wait for each other run."""

from __future__ import annotations

import threading

from softhooks.runtime.running import CallBlock, RunningCalls


def test_a_new_call_lets_a_waiting_exclusive_call_go_first() -> None:
    """Otherwise, threads that run the model again and again would keep a change of its prompts waiting for ever."""
    running = RunningCalls()
    blocks = {"exclusive": running.exclusive("a change"), "new": running.block("a call")}
    arrived = {name: threading.Event() for name in blocks}  # it waits, or has ended
    order: list[str] = []
    wait = running._changed.wait

    def noticed(timeout: float | None = None) -> bool:
        arrived[threading.current_thread().name].set()
        return wait(timeout)

    def run(name: str, block: CallBlock) -> None:
        with block:
            order.append(name)
        arrived[name].set()

    running._changed.wait = noticed  # type: ignore[method-assign]
    threads = [threading.Thread(target=run, args=one, name=one[0]) for one in blocks.items()]
    with running.block("a call that runs"):
        for thread in threads:
            thread.start()
            assert arrived[thread.name].wait(300)
        assert not order
    for thread in threads:
        thread.join()
    assert order == ["exclusive", "new"]
