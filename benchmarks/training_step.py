"""The time of a training step: forward, backward, AdamW and zero_grad, with one thread.

Every contestant sees the same text and computes the same loss. The bare model's backward goes down to the text's embeddings.
Calls are plain, `model(input_ids, attention_mask, labels)`, so each model also returns its cache, which PEFT's prefix cannot do
without. See `clock` for how times are taken.
"""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from benchmarks import naive
from benchmarks.clock import Timing, one_thread, ratio, take_turns
from benchmarks.contestants import (
    BARE,
    PAIRS,
    PEFT,
    PREFIX,
    PREFIX_MLP,
    PROMPT,
    SOFTHOOKS,
    Contestant,
    bare,
    with_peft,
    with_softhooks,
)
from benchmarks.exactness import difference, outcome
from benchmarks.models import Batch, llama, text, words
from benchmarks.profiles import Profile, Shape
from benchmarks.result import Column, Result, Target

REQUIRED: dict[tuple[str, int], float] = {
    (PROMPT.name, 20): 1.0,
    (PROMPT.name, 100): 1.9,
    (PROMPT.name, 300): 3.2,
    (PREFIX.name, 20): 1.0,
    (PREFIX.name, 100): 1.0,
    (PREFIX.name, 300): 1.0,
    (PREFIX_MLP.name, 20): 1.0,
    (PREFIX_MLP.name, 100): 1.15,
    (PREFIX_MLP.name, 300): 1.0,
}
"""How many times faster than PEFT's a step must be, by method and P."""

COLUMNS = (
    Column("method", "{method}"),
    Column("P/T/B", "{shape}"),
    Column("bare, ms", "{bare_ms:.0f}"),
    Column("softhooks / bare", "{softhooks_to_bare:.2f}"),
    Column("PEFT / bare", "{peft_to_bare:.2f}"),
    Column("times PEFT's speed", "{speedup:.2f} ({speedup_low:.2f} to {speedup_high:.2f})"),
    Column("by the shortest", "{speedup_of_shortest:.2f}"),
    Column("at least", "{required:g}"),
    Column("loss off the oracle's", "{oracle_loss:.0e}"),
    Column("gradient off", "{oracle_gradient:.0e}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Time every method at every shape."""
    task = progress.add_task("training step", total=sum(profile.step_rounds))
    rows: list[dict[str, Any]] = []
    with one_thread():
        for shape, rounds in zip(profile.shapes, profile.step_rounds, strict=True):
            rows += _measure(profile, shape, rounds, lambda: progress.advance(task))
    return Result(
        name="training_step",
        title="Training step: times the bare model's, and softhooks against PEFT",
        explanation=(
            "Medians of ratios of CPU time, paired within rounds, with their 95% intervals, and beside them the ratio of the "
            "shortest times. The bare model sees the same text without a prompt."
        ),
        columns=COLUMNS,
        rows=sorted(rows, key=lambda row: [pair.name for pair in PAIRS].index(row["method"])),
        targets=[
            Target(
                f"{row['method']} {row['shape']}: times PEFT's speed",
                row["speedup"],
                "at least",
                row["required"],
                row["speedup_high"],
            )
            for row in rows
            if "required" in row
        ],
        settings={"model": vars(profile.model), "rounds": profile.step_rounds},
    )


def _measure(profile: Profile, shape: Shape, rounds: int, tick: Any) -> list[dict[str, Any]]:
    """Let the bare model and both libraries' three methods take turns at one shape."""
    base = llama(profile.model, profile.seed)
    batch = text(profile.model, shape, profile.seed)
    ids = words(profile.model, shape.virtual, profile.seed)
    everyone: dict[str, Contestant] = {BARE: bare(base)}
    exact: dict[str, tuple[float, float]] = {}
    for pair in PAIRS:
        ours = everyone[f"{SOFTHOOKS} {pair.name}"] = with_softhooks(base, pair, ids)
        everyone[f"{PEFT} {pair.name}"] = with_peft(base, pair, ours)
        exact[pair.name] = difference(outcome(ours, batch), naive.backward(base, pair, list(ours.prompt), batch))
    steps = {name: _step(contestant, batch) for name, contestant in everyone.items()}
    timings = take_turns(steps, rounds, profile.seed, tick)
    return [_row(pair.name, shape, timings, exact[pair.name]) for pair in PAIRS]


def _step(contestant: Contestant, batch: Batch) -> Any:
    return lambda: contestant.step(batch)


def _row(method: str, shape: Shape, timings: dict[str, Timing], exact: tuple[float, float]) -> dict[str, Any]:
    plain, ours, theirs = timings[BARE], timings[f"{SOFTHOOKS} {method}"], timings[f"{PEFT} {method}"]
    speedup = ratio(theirs, ours)
    row = {
        "method": method,
        "shape": str(shape),
        "bare_ms": plain.milliseconds,
        "softhooks_ms": ours.milliseconds,
        "peft_ms": theirs.milliseconds,
        "bare_least_wall_ms": plain.least_wall_milliseconds,
        "softhooks_least_wall_ms": ours.least_wall_milliseconds,
        "peft_least_wall_ms": theirs.least_wall_milliseconds,
        "softhooks_to_bare": ratio(ours, plain).value,
        "peft_to_bare": ratio(theirs, plain).value,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "speedup_of_shortest": min(theirs.cpu) / min(ours.cpu),
        "oracle_loss": exact[0],
        "oracle_gradient": exact[1],
    }
    if (method, shape.virtual) in REQUIRED:
        row["required"] = REQUIRED[method, shape.virtual]
    return row
