"""Execute runs in parallel, each in a process of its own, so that memory is measured for each run."""

from __future__ import annotations

import contextlib
import io
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.quality.records import Run, Store
from benchmarks.quality.run import execute, read_task, start_process


def execute_all(
    title: str, runs: Sequence[Run], store: Store, console: Console, workers: int, threads: int, deadline: float
) -> list[Run]:
    """Execute runs and write their results; return those that failed.

    Args:
        title: the text before the progress bar.
        workers: the number of runs in parallel.
        threads: the number of threads of each run.
        deadline: no run is started after this time, as `time.monotonic()` counts it.
    """
    failed: list[Run] = []
    retried: set[Run] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=len(runs))
        waiting = list(reversed(runs))
        while waiting and time.monotonic() < deadline:
            lost = _until_broken(waiting, failed, store, workers, threads, deadline, progress, task)
            for run in store.missing(lost):
                if run in retried:
                    failed.append(run)
                else:
                    retried.add(run)
                    waiting.append(run)
            progress.update(task, completed=len(runs) - len(waiting))
    return failed


def _until_broken(
    waiting: list[Run],
    failed: list[Run],
    store: Store,
    workers: int,
    threads: int,
    deadline: float,
    progress: Progress,
    task: TaskID,
) -> list[Run]:
    """Execute runs from the end of `waiting` until all are done or a process is killed; add to `failed` those with an error.

    Returns:
        the runs that were in progress when a process was killed, for example because it needed too much memory.
    """
    running: dict[Future[str | None], Run] = {}
    context = _processes()
    with ProcessPoolExecutor(
        workers, context, initializer=start_process, initargs=(threads,), max_tasks_per_child=1
    ) as pool:
        while True:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                try:
                    future = pool.submit(_execute, waiting[-1], store)
                except BrokenProcessPool:
                    return list(running.values())
                running[future] = waiting.pop()
            if not running:
                return []
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    error = future.result()
                except BrokenProcessPool as broken:  # the pool cannot be used again
                    progress.console.print(f"{broken}\n{list(running.values())}", markup=False)
                    return list(running.values())
                run = running.pop(future)
                if error:
                    failed.append(run)
                    progress.console.print(f"{run}\n{error}", markup=False)
                progress.advance(task)


def _processes() -> BaseContext:
    """Return how processes are started: forked from one that has imported the packages, where the system can do so."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.quality.run"])
    return context


def _execute(run: Run, store: Store) -> str | None:
    """Execute a run and write its result; return the traceback if it failed."""
    try:
        store.check_provenance(run.task, read_task(run.task).provenance)
        with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its logs
            store.put(execute(run))
    except Exception:  # noqa: BLE001  # the other runs continue
        return traceback.format_exc()
    return None
