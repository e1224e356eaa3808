"""The speed of `verify_frozen`: reading every frozen tensor and comparing its digest, with one thread.

SHA-256 over the same bytes is timed for comparison. Flipping the last bit of one weight shows that the check detects it.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

import softhooks
from benchmarks.clock import one_thread
from benchmarks.models import llama
from benchmarks.profiles import Profile
from benchmarks.result import Column, Result, Target

COLUMNS = (
    Column("what", "{what}"),
    Column("tensors", "{tensors}"),
    Column("MB", "{megabytes:.1f}"),
    Column("ms", "{milliseconds:.1f}"),
    Column("GB/s", "{gigabytes_per_second:.1f}"),
    Column("a flipped bit is", "{flipped}"),
)


def run(profile: Profile, progress: Progress) -> Result:
    """Verify a large model several times, then after flipping one bit."""
    task = progress.add_task("frozen", total=profile.verifications + 2)
    model = llama(profile.large, profile.seed)
    with one_thread(), softhooks.attach(model, softhooks.PromptTuning(20)) as prompt:
        progress.advance(task)
        seconds = []
        for _ in range(profile.verifications):
            started = time.process_time()
            report = prompt.verify_frozen()
            seconds.append(time.process_time() - started)
            progress.advance(task)
        rows = [_row("verify_frozen", report.tensors, report.bytes, statistics.median(seconds))]
        rows[0]["flipped"] = "named" if _is_noticed(prompt, model) else "missed"
        rows.append(_row("SHA-256 of the same", report.tensors, report.bytes, _sha256(model)))
        progress.advance(task)
    return Result(
        name="frozen",
        title="verify_frozen: reading every frozen tensor again",
        explanation="Median CPU time of the check of a model in fp32, from memory.",
        columns=COLUMNS,
        rows=rows,
        targets=[Target("a flipped bit is named", float(rows[0]["flipped"] == "named"), "at least", 1)],
        settings={"model": vars(profile.large), "verifications": profile.verifications},
    )


def _row(what: str, tensors: int, size: int, seconds: float) -> dict[str, Any]:
    return {
        "what": what,
        "tensors": tensors,
        "megabytes": size / 1e6,
        "milliseconds": 1e3 * seconds,
        "gigabytes_per_second": size / 1e9 / max(seconds, 1e-9),
    }


def _is_noticed(prompt: softhooks.SoftPrompt, model: nn.Module) -> bool:
    """Flip the last bit of one number, see whether the check names its tensor, and flip it back."""
    name, weight = next(iter(model.named_parameters()))
    bits = weight.detach().view(torch.int32).view(-1)
    bits[-1] ^= 1
    try:
        prompt.verify_frozen()
    except softhooks.FrozenModifiedError as error:
        return name in str(error)
    finally:
        bits[-1] ^= 1
    return False


def _sha256(model: nn.Module) -> float:
    started = time.process_time()
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith("soft_prompt."):
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.hexdigest()
    return time.process_time() - started
