"""The peak memory of a training step.

The profiler reports every allocation and deallocation of torch's CPU allocator from the start of the forward to the end of
zero_grad; the peak is the highest running sum. It is exact, and the same in every run on one machine. On another machine,
operators such as the LSTM may use other kernels and keep more or less (P-tuning's peak at 100/64/8 was 159 MB on one and 164
on another). It includes the activations that autograd keeps, temporaries, gradients and the forward's outputs.

It does **not** include what exists before the step, weights and optimizer state; the last column adds the weights to both
sides. Nor does it include what libraries such as oneDNN allocate themselves.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks.clock import one_thread
from benchmarks.contestants import (
    ADAPTER,
    CONTEXT,
    MPT,
    P_TUNING,
    PAIRS,
    PREFIX,
    PROMPT,
    Contestant,
    Pair,
    bare,
    with_peft,
    with_softhooks,
)
from benchmarks.models import Batch, llama, text, words
from benchmarks.profiles import Profile, Shape
from benchmarks.result import Column, Result, Target

LESS: dict[tuple[str, int], float] = {
    (PROMPT.name, 100): 1.9,
    (P_TUNING.name, 100): 1.9,
    (MPT.name, 100): 1.9,
    (PREFIX.name, 100): 1.0,
    (ADAPTER.name, 20): 1.0,
    (CONTEXT.name, 400): 5.0,
}
"""The least ratio of PEFT's peak to softhooks', by method and P."""

REQUIRED: dict[tuple[str, int], float] = {
    (PROMPT.name, 100): 1.2,
    (P_TUNING.name, 100): 1.25,
    (MPT.name, 100): 1.2,
    (PREFIX.name, 100): 1.1,
    (ADAPTER.name, 20): 1.15,
    (ADAPTER.name, 100): 1.3,
}
"""The greatest ratio of softhooks' peak to the bare model's, by method and P."""

COLUMNS = (
    Column("method", "{method}"),
    Column("P/T/B", "{shape}"),
    Column("bare, MB", "{bare_mb:.0f}"),
    Column("softhooks, MB", "{softhooks_mb:.0f}"),
    Column("PEFT, MB", "{peft_mb:.0f}"),
    Column("softhooks / bare", "{softhooks_to_bare:.2f}"),
    Column("PEFT / bare", "{peft_to_bare:.2f}"),
    Column("at most", "{required:g}"),
    Column("PEFT / softhooks", "{peft_to_softhooks:.2f}"),
    Column("at least", "{less:g}"),
    Column("the same with weights", "{softhooks_with_weights:.2f}, PEFT {peft_with_weights:.2f}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Find the peak of every method at every shape."""
    shapes = [(shape, PAIRS) for shape in profile.memory_shapes]
    shapes += [(shape, (CONTEXT,)) for shape in profile.context_shapes]
    task = progress.add_task("memory", total=sum(1 + 2 * len(pairs) for _, pairs in shapes))
    rows: list[dict[str, Any]] = []
    with one_thread():
        for shape, pairs in shapes:
            rows += _measure(profile, shape, pairs, lambda: progress.advance(task))
    return Result(
        name="memory",
        title="Peak memory of a training step",
        explanation=(
            "The highest running sum of what torch's allocator hands out during one step (activations, temporaries, gradients); "
            "weights are not counted, or added to both sides in the last column."
        ),
        columns=COLUMNS,
        rows=sorted(rows, key=lambda row: [pair.name for pair in (*PAIRS, CONTEXT)].index(row["method"])),
        targets=[
            Target(
                f"{row['method']} {row['shape']}: times the bare model's peak",
                row["softhooks_to_bare"],
                "at most",
                row["required"],
            )
            for row in rows
            if "required" in row
        ]
        + [
            Target(
                f"{row['method']} {row['shape']}: PEFT's peak in softhooks' peaks",
                row["peft_to_softhooks"],
                "at least",
                row["less"],
            )
            for row in rows
            if "less" in row
        ],
        settings={"model": vars(profile.model)},
    )


def _measure(profile: Profile, shape: Shape, pairs: tuple[Pair, ...], tick: Any) -> list[dict[str, Any]]:
    base = llama(profile.model, profile.seed)
    batch = text(profile.model, shape, profile.seed)
    ids = words(profile.model, shape.virtual, profile.seed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    plain = peak(bare(base), batch)
    tick()
    rows = []
    for pair in pairs:
        contestant = with_softhooks(base, pair, ids)
        ours = peak(contestant, batch)
        tick()
        theirs = peak(with_peft(base, pair, contestant), batch)
        tick()
        rows.append(_row(pair.name, shape, plain, ours, theirs, weights))
    return rows


def peak(contestant: Contestant, batch: Batch) -> int:
    """The peak memory of one training step in bytes, after a first step that creates the optimizer state."""
    contestant.step(batch)
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        contestant.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest


def _row(method: str, shape: Shape, plain: int, ours: int, theirs: int, weights: int) -> dict[str, Any]:
    row = {
        "method": method,
        "shape": str(shape),
        "bare_mb": plain / 1e6,
        "softhooks_mb": ours / 1e6,
        "peft_mb": theirs / 1e6,
        "weights_mb": weights / 1e6,
        "softhooks_to_bare": ours / plain,
        "peft_to_bare": theirs / plain,
        "peft_to_softhooks": theirs / ours,
        "softhooks_with_weights": (ours + weights) / (plain + weights),
        "peft_with_weights": (theirs + weights) / (plain + weights),
    }
    if (method, shape.virtual) in REQUIRED:
        row["required"] = REQUIRED[method, shape.virtual]
    if (method, shape.virtual) in LESS:
        row["less"] = LESS[method, shape.virtual]
    return row
