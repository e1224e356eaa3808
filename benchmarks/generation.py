"""The time of `generate`: prefill and some tokens, greedily, with one thread.

Every prompt is initialized as the same words, so that all contestants compute the same function as the bare model with these
words in its text (a hard prompt) and must generate the same tokens. softhooks computes the prompt's keys and values once per
call: `computed` counts how often.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.clock import Timing, one_thread, ratio, take_turns
from benchmarks.contestants import BARE, PEFT, PREFIX, PROMPT, SOFTHOOKS, Contestant, with_peft, with_softhooks
from benchmarks.models import Batch, llama, text, words
from benchmarks.profiles import Profile, Shape
from benchmarks.result import Column, Result, Target

PAIRS = (PROMPT, PREFIX)
NO_PROMPT = "no prompt"
SAME_TOKENS = 0.95
"""The share of tokens that must equal the hard prompt's. Rounding can break a tie, which changes the rest of the row."""

COLUMNS = (
    Column("method", "{method}"),
    Column("P/T/B", "{shape}"),
    Column("hard prompt, ms", "{hard_ms:.0f}"),
    Column("softhooks / hard", "{softhooks_to_hard:.2f}"),
    Column("PEFT / hard", "{peft_to_hard:.2f}"),
    Column("no prompt / hard", "{nothing_to_hard:.2f}"),
    Column("times PEFT's speed", "{speedup:.2f} ({speedup_low:.2f} to {speedup_high:.2f})"),
    Column("tokens as with the hard prompt", "{same:.0%}, PEFT {peft_same:.0%}"),
    Column("prompt computed", "{computed} in {calls} calls"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Time both methods at every shape."""
    task = progress.add_task("generation", total=len(profile.shapes) * profile.generation_rounds)
    rows: list[dict[str, Any]] = []
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT drops those of `generate`
        for shape in profile.shapes:
            rows += _measure(profile, shape, lambda: progress.advance(task))
    return Result(
        name="generation",
        title=f"Generation: prefill and {profile.new_tokens} tokens, times the bare model with a hard prompt of P words",
        explanation=(
            "Medians of ratios of CPU time, paired within rounds. `prompt computed`: how often keys and values were made in all "
            "calls together."
        ),
        columns=COLUMNS,
        rows=sorted(rows, key=lambda row: [pair.name for pair in PAIRS].index(row["method"])),
        targets=_targets(rows),
        settings={
            "model": vars(profile.model),
            "rounds": profile.generation_rounds,
            "new_tokens": profile.new_tokens,
        },
    )


def _measure(profile: Profile, shape: Shape, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Time the bare model, with and without a hard prompt, and both libraries at one shape."""
    base = llama(profile.model, profile.seed).eval()
    batch = text(profile.model, shape, profile.seed)
    ids = words(profile.model, shape.virtual, profile.seed)
    hard = torch.cat([ids.expand(shape.rows, -1), batch["input_ids"]], dim=1)
    hard_batch = {"input_ids": hard, "attention_mask": torch.ones_like(hard)}
    calls = {BARE: _generate(base, hard_batch, profile), NO_PROMPT: _generate(base, batch, profile)}
    prompts: dict[str, Contestant] = {}
    for pair in PAIRS:
        ours = prompts[pair.name] = with_softhooks(base, pair, ids)
        calls[f"{SOFTHOOKS} {pair.name}"] = _generate(ours.model, batch, profile)
        calls[f"{PEFT} {pair.name}"] = _generate(with_peft(base, pair, ours).model, batch, profile)
    before = {name: _computed(contestant) for name, contestant in prompts.items()}
    timings = take_turns(calls, profile.generation_rounds, profile.seed, tick)
    tokens = {name: call()[:, -profile.new_tokens :] for name, call in calls.items()}
    rows = []
    for name, contestant in prompts.items():
        row = _row(name, shape, timings, tokens)
        row["computed"] = _computed(contestant) - before[name]
        row["calls"] = profile.generation_rounds + 2  # the first, which is not timed, and the one for the tokens
        row["recomputed"] = _recomputed(contestant, calls[f"{SOFTHOOKS} {name}"])
        rows.append(row)
    return rows


def _generate(model: nn.Module, batch: Batch, profile: Profile) -> Callable[[], Tensor]:
    generate: Any = model.generate
    count = profile.new_tokens

    def call() -> Tensor:
        tokens: Tensor = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return tokens

    return call


def _computed(contestant: Contestant) -> int:
    assert contestant.handle is not None
    return contestant.handle.computed


def _recomputed(contestant: Contestant, call: Callable[[], object]) -> int:
    """How often keys and values are computed in two calls after the prompt has changed."""
    before = _computed(contestant)
    with torch.no_grad():
        contestant.prompt[0].mul_(1.01)
    call()
    call()
    return _computed(contestant) - before


def _row(method: str, shape: Shape, timings: dict[str, Timing], tokens: dict[str, Tensor]) -> dict[str, Any]:
    hard, ours, theirs = timings[BARE], timings[f"{SOFTHOOKS} {method}"], timings[f"{PEFT} {method}"]
    speedup = ratio(theirs, ours)
    return {
        "method": method,
        "shape": str(shape),
        "hard_ms": hard.milliseconds,
        "softhooks_ms": ours.milliseconds,
        "peft_ms": theirs.milliseconds,
        "softhooks_to_hard": ratio(ours, hard).value,
        "peft_to_hard": ratio(theirs, hard).value,
        "nothing_to_hard": ratio(timings[NO_PROMPT], hard).value,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "same": _share(tokens[f"{SOFTHOOKS} {method}"], tokens[BARE]),
        "peft_same": _share(tokens[f"{PEFT} {method}"], tokens[BARE]),
    }


def _share(tokens: Tensor, others: Tensor) -> float:
    return float((tokens == others).float().mean())


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    targets = []
    for row in rows:
        name = f"{row['method']} {row['shape']}"
        targets.append(Target(f"{name}: tokens as with the hard prompt", row["same"], "at least", SAME_TOKENS))
        targets.append(
            Target(f"{name}: prompt computed in {row['calls']} calls", row["computed"], "at most", row["calls"])
        )
        targets.append(Target(f"{name}: computed anew in two calls", row["recomputed"], "at least", 2))
    return targets
