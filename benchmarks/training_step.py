"""The time of a training step: forward, backward, AdamW and zero_grad, with one thread.

Every contestant sees the same text and computes the same loss. The bare model's backward goes down to the text's embeddings.
Calls are plain, `model(input_ids, attention_mask, labels)`, so each model also returns its cache, which PEFT's prefix
requires. See `clock` for how times are measured.
"""

from __future__ import annotations

from typing import Any

from rich.progress import Progress

from benchmarks import naive
from benchmarks.clock import Timing, one_thread, ratio, take_turns
from benchmarks.contestants import (
    ADAPTER,
    ADAPTER_DEFAULT,
    BARE,
    CONTEXT,
    MPT,
    MULTITASK,
    P_TUNING,
    PEFT,
    PREFIX,
    PREFIX_MLP,
    PROMPT,
    SOFTHOOKS,
    Contestant,
    Pair,
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
    (P_TUNING.name, 20): 1.0,
    (P_TUNING.name, 100): 1.9,
    (P_TUNING.name, 300): 3.2,
    (PREFIX.name, 20): 1.0,
    (PREFIX.name, 100): 1.0,
    (PREFIX.name, 300): 1.0,
    (PREFIX_MLP.name, 20): 1.0,
    (PREFIX_MLP.name, 100): 1.15,
    (PREFIX_MLP.name, 300): 1.0,
    (ADAPTER.name, 20): 1.0,
    (ADAPTER.name, 100): 1.0,
    (ADAPTER.name, 300): 1.0,
    (ADAPTER_DEFAULT.name, 20): 1.0,
    (ADAPTER_DEFAULT.name, 100): 1.0,
    (ADAPTER_DEFAULT.name, 300): 1.0,
    (MPT.name, 20): 1.0,
    (MPT.name, 100): 1.9,
    (MPT.name, 300): 3.2,
    (CONTEXT.name, 400): 5.0,
}
"""The least speed of a step relative to PEFT's, by method and P."""

LIMITS: dict[tuple[str, int], float] = {(ADAPTER.name, 20): 1.15, (ADAPTER_DEFAULT.name, 20): 1.15}
"""The greatest time of a step relative to the bare model's, by method and P."""

PAIRS = (PROMPT, P_TUNING, PREFIX, PREFIX_MLP, ADAPTER, ADAPTER_DEFAULT, *MULTITASK)

COLUMNS = (
    Column("method", "{method}"),
    Column("P/T/B", "{shape}"),
    Column("bare, ms", "{bare_ms:.0f}"),
    Column("softhooks / bare", "{softhooks_to_bare:.2f}"),
    Column("at most", "{limit:g}"),
    Column("PEFT / bare", "{peft_to_bare:.2f}"),
    Column("times PEFT's speed", "{speedup:.2f} ({speedup_low:.2f} to {speedup_high:.2f})"),
    Column("by the shortest", "{speedup_of_shortest:.2f}"),
    Column("at least", "{required:g}"),
    Column("loss off the oracle's", "{oracle_loss:.0e}"),
    Column("gradient off", "{oracle_gradient:.0e}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Time every method at every shape."""
    shapes = [(shape, rounds, PAIRS) for shape, rounds in zip(profile.shapes, profile.step_rounds, strict=True)]
    shapes += [(shape, profile.context_rounds, (CONTEXT,)) for shape in profile.context_shapes]
    task = progress.add_task("training step", total=sum(rounds for _, rounds, _ in shapes))
    rows: list[dict[str, Any]] = []
    with one_thread():
        for shape, rounds, pairs in shapes:
            rows += _measure(profile, shape, rounds, pairs, lambda: progress.advance(task))
    return Result(
        name="training_step",
        title="Training step: times the bare model's, and softhooks against PEFT",
        explanation=(
            "Medians of ratios of CPU time, paired within rounds, with their 95% intervals, and the ratio of the "
            "shortest times. The bare model sees the same text without a prompt. Rows of 8 tasks in one batch need 8 prompts, as "
            "many as PEFT runs: there multitask prompts are hardly faster, and no bound is set."
        ),
        columns=COLUMNS,
        rows=sorted(rows, key=lambda row: [pair.name for pair in (*PAIRS, CONTEXT)].index(row["method"])),
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
        ]
        + [
            Target(
                f"{row['method']} {row['shape']}: times the bare model's step",
                row["softhooks_to_bare"],
                "at most",
                row["limit"],
            )
            for row in rows
            if "limit" in row
        ],
        settings={"model": vars(profile.model), "rounds": profile.step_rounds},
    )


def _measure(profile: Profile, shape: Shape, rounds: int, pairs: tuple[Pair, ...], tick: Any) -> list[dict[str, Any]]:
    """Time the bare model and both libraries at one shape."""
    base = llama(profile.model, profile.seed)
    batch = text(profile.model, shape, profile.seed)
    ids = words(profile.model, shape.virtual, profile.seed)
    everyone: dict[str, Contestant] = {BARE: bare(base)}
    exact: dict[str, tuple[float, float]] = {}
    for pair in pairs:
        ours = everyone[f"{SOFTHOOKS} {pair.name}"] = with_softhooks(base, pair, ids)
        everyone[f"{PEFT} {pair.name}"] = with_peft(base, pair, ours)
        if pair is CONTEXT:
            oracle = naive.context_backward(base, ids, ours.prompt[0], batch)
        else:
            oracle = naive.backward(base, pair, list(ours.prompt), batch)
        exact[pair.name] = difference(outcome(ours, batch), oracle)
    steps = {name: _step(contestant, batch) for name, contestant in everyone.items()}
    timings = take_turns(steps, rounds, profile.seed, tick)
    return [_row(pair.name, shape, timings, exact[pair.name]) for pair in pairs]


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
    if (method, shape.virtual) in LIMITS:
        row["limit"] = LIMITS[method, shape.virtual]
    return row
