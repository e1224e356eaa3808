"""Exactness: softhooks compared with an oracle made by hand and with PEFT.

The oracle concatenates embeddings by hand, or starts from a seeded cache; see `naive`. PEFT gets the same values as its
prompt. The text is unpadded and the first real token has no label: in this case PEFT is exact and trains the same tokens.
Differences are relative: that of the loss, and that of each gradient to its own largest entry, of which the worst parameter
counts. Where PEFT computes in fp32 regardless of its model, the tolerance is that of fp32.
"""

from __future__ import annotations

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks import naive
from benchmarks.contestants import PAIRS, Contestant, Pair, with_peft, with_softhooks
from benchmarks.models import Batch, in_fp64, llama, text, words
from benchmarks.profiles import Profile, Shape
from benchmarks.result import Column, Result, Target

LIMITS = {torch.float32: (1e-6, 1e-4), torch.float64: (1e-13, 1e-11)}
"""The tolerances of the loss and of the gradients: some dozens of units in the last place."""

COLUMNS = (
    Column("method", "{method}"),
    Column("P/T/B", "{shape}"),
    Column("precision", "{precision}"),
    Column("loss", "{loss:.6f}"),
    Column("loss off the oracle's", "{oracle_loss:.0e}"),
    Column("gradient off the oracle's", "{oracle_gradient:.0e}"),
    Column("loss off PEFT's", "{peft_loss:.0e}"),
    Column("gradient off PEFT's", "{peft_gradient:.0e}"),
)

Outcome = tuple[Tensor, list[Tensor]]
"""A loss and the gradients of the prompt's parameters."""


def run(profile: Profile, progress: Progress) -> Result:
    """Compare every method at every shape in fp32 and fp64."""
    task = progress.add_task("exactness", total=2 * len(profile.exact_shapes) * len(PAIRS))
    rows = []
    for precision in LIMITS:
        for shape in profile.exact_shapes:
            for pair in PAIRS:
                rows.append(_row(profile, shape, pair, precision))
                progress.advance(task)
    return Result(
        name="exactness",
        title="Exactness: differences of loss and gradients from the oracle's and from PEFT's",
        explanation=(
            "Relative differences, for a prompt with the same numbers in each; unpadded text, the first real token without a "
            "label."
        ),
        columns=COLUMNS,
        rows=rows,
        targets=_targets(rows),
        settings={"model": vars(profile.model)},
    )


def outcome(contestant: Contestant, batch: Batch) -> Outcome:
    """Train one step without the optimizer, and keep nothing."""
    precise = contestant.prompt[0].dtype is torch.float64
    loss = contestant.backward_in_fp64(batch) if precise else contestant.backward(batch)
    return loss, contestant.gradients()


def difference(mine: Outcome, theirs: Outcome) -> tuple[float, float]:
    """The relative difference of two losses, and the worst of their gradients."""
    loss = abs(mine[0] - theirs[0]) / abs(theirs[0])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine[1], theirs[1], strict=True))
    return float(loss), worst


def _row(profile: Profile, shape: Shape, pair: Pair, precision: torch.dtype) -> dict[str, object]:
    base = llama(profile.model, profile.seed)
    if precision is torch.float64:
        base = in_fp64(base)
    batch = text(profile.model, shape, profile.seed)
    ours = with_softhooks(base, pair, words(profile.model, shape.virtual, profile.seed))
    theirs = with_peft(base, pair, ours)
    mine = outcome(ours, batch)
    oracle = difference(mine, naive.backward(base, pair, list(ours.prompt), batch))
    peer = difference(mine, outcome(theirs, batch))
    return {
        "method": pair.name,
        "shape": str(shape),
        "precision": str(precision).removeprefix("torch."),
        "loss": float(mine[0]),
        "oracle_loss": oracle[0],
        "oracle_gradient": oracle[1],
        "peft_loss": peer[0],
        "peft_gradient": peer[1],
        "is_peft_precise": pair.is_precise,
    }


def _targets(rows: list[dict[str, object]]) -> list[Target]:
    targets = []
    for row in rows:
        precision = getattr(torch, str(row["precision"]))
        for other, whose in (("oracle", "the oracle's"), ("peft", "PEFT's")):
            limits = LIMITS[precision if other == "oracle" or row["is_peft_precise"] else torch.float32]
            for what, limit in zip(("loss", "gradient"), limits, strict=True):
                name = f"{row['method']} {row['shape']} {row['precision']}: {what} off {whose}"
                targets.append(Target(name, float(str(row[f"{other}_{what}"])), "at most", limit))
    return targets
