"""Timing that is robust on a busy machine.

The contestants take turns, in a new random order each round, so that whatever slows the machine down slows all of them. The
figure is **CPU time** of this process, which runs one thread: it excludes the time in which other programs had the core.
On an idle machine it equals the wall time, which is recorded too. Two contestants are compared **within each round**. Reported
is the median of those ratios with its 95% confidence interval, which makes no assumption about the distribution.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Timing:
    """One contestant's seconds, round by round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median CPU time."""
        return 1e3 * statistics.median(self.cpu)

    @property
    def least_wall_milliseconds(self) -> float:
        """The shortest wall time."""
        return 1e3 * min(self.wall)


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and its 95% interval."""

    value: float
    low: float
    high: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that the number of cores does not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, seed: int, tick: Callable[[], None]
) -> dict[str, Timing]:
    """Measure every contestant once per round, after one warm-up turn."""
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    timings = {name: Timing() for name in order}
    for contestant in contestants.values():
        contestant()
    for _ in range(rounds):
        shuffle(order)
        with _no_collection():
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                contestants[name]()
                timings[name].cpu.append(time.process_time() - cpu)
                timings[name].wall.append(time.perf_counter() - wall)
        tick()
    return timings


def ratio(above: Timing, below: Timing) -> Ratio:
    """Compare two contestants, round by round."""
    ratios = sorted(a / b for a, b in zip(above.cpu, below.cpu, strict=True))
    low, high = _median_interval(ratios)
    return Ratio(statistics.median(ratios), low, high)


def _median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The order statistics that enclose the median with at least 95% (sign test); the minimum and maximum if n is below 6."""
    n = len(ordered)
    outside, tail = 0, 0.5**n
    while outside < (n - 1) // 2 and tail + math.comb(n, outside + 1) * 0.5**n <= 0.025:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    return ordered[outside], ordered[n - 1 - outside]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now, so that it is in no contestant's time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
