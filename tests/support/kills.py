"""Kill trainings at random moments, restart them until they finish, and compare each with one that was never killed.

    python tests/support/kills.py --kills 50 --seed 0      every method in turn, at random moments
    python tests/support/kills.py --each                   every method once at each of the moments that were chosen

Every run is a fork of this process, so that a start costs no import. It saves at each step and is killed with SIGKILL or SIGTERM;
the next fork resumes, with `resume_from_checkpoint=True` or from a checkpoint that it looked for before it made its Trainer.
A loss is: a start that fails, one that resumes from less than the last whole checkpoint, or an end that differs in one bit.

The moments that were chosen: between the optimizer's step and the method's own constraint, when nothing of the step is saved; and
when half of the next checkpoint is written, the prompt's live numbers not yet in their place.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import training
from table import LEARNERS
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.trainer_utils import get_last_checkpoint
from untouched import leave_libraries_alone

from softhooks.formats.softhooks_files import LIVE
from softhooks.saving.live_state import live_tensors

STEPS = 6
RESULT, STARTS, ERROR = "result.pt", "starts.txt", "error.txt"
METHODS = {entry.name: entry for entry in LEARNERS}
MOMENTS = {"before the constraint": 4, "within a checkpoint": 5}
"""The step at which each happens, by name."""


def train(name: str, folder: Path, looks_first: bool = False, moment: str | None = None) -> None:
    """One start of a user's training script, resumed if there is a checkpoint.

    Args:
        looks_first: whether it looks for the last checkpoint before it makes its Trainer.
        moment: at which it dies.
    """
    if moment is not None:
        die_at(moment)
    last = get_last_checkpoint(str(folder))
    trainer, callback = training.learning(
        folder, METHODS[name], save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=STEPS, weight_decay=0.1,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    if not looks_first:
        last = get_last_checkpoint(str(folder))
    with (folder / STARTS).open("a") as file:
        file.write(f"{0 if last is None else step_of(Path(last))}\n")
    trainer.train(resume_from_checkpoint=last if looks_first else last is not None)
    logs = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in trainer.state.log_history
    ]
    assert trainer.optimizer is not None
    assert callback.soft_prompt is not None
    live = {name: value.clone() for name, value in live_tensors(callback.soft_prompt).items()}
    result = {"trained": live, "optimizer": trainer.optimizer.state_dict(), "logs": logs[:STEPS]}
    torch.save(result, folder / f"{RESULT}.part")
    (folder / f"{RESULT}.part").rename(folder / RESULT)


def die_at(moment: str) -> None:
    """Kill this process at a moment of its training."""
    if moment == "before the constraint":
        steps = iter(range(1, STEPS + 1))

        def after_step(*_: Any) -> None:
            if next(steps) == MOMENTS[moment]:
                os.kill(os.getpid(), signal.SIGKILL)

        register_optimizer_step_post_hook(after_step)  # the first of its kind; the constraint's hook comes after
        return
    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        if target.name == LIVE and target.parent.name == f"checkpoint-{MOMENTS[moment]}":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replaced  # type: ignore[assignment, method-assign]


def forked(work: Callable[[], None], folder: Path) -> int:
    """Run something in a fork of this process; an error is written to a file."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        work()
    except BaseException:  # noqa: BLE001 - whatever it is, it is a loss
        (folder / ERROR).write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def step_of(folder: Path) -> int:
    """The step of a checkpoint whose last file, the Trainer's state, can be read; 0 otherwise."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    except (ValueError, FileNotFoundError):
        return 0


def whole(folder: Path) -> int:
    """The step of the last whole checkpoint."""
    return max([0, *(step_of(checkpoint) for checkpoint in folder.glob("checkpoint-*"))])


@dataclass
class Score:
    """The counts so far."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    torn: int = 0
    losses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Whole:
    """A run that was never killed: its result and its duration."""

    result: Any
    seconds: float


def undisturbed(name: str, place: Path) -> Whole:
    """Run a method once to its end."""
    folder = place / name
    folder.mkdir()
    began = time.monotonic()
    _, status = os.waitpid(forked(lambda: train(name, folder), folder), 0)
    if status:
        raise RuntimeError(f"{name}: {(folder / ERROR).read_text()}")
    return Whole(torch.load(folder / RESULT), time.monotonic() - began)


def finished(name: str, folder: Path, expected: Whole, status: int, known: int, score: Score) -> bool:
    """Check a start that has ended; return whether the run is complete."""
    starts = [int(line) for line in (folder / STARTS).read_text().split()] if (folder / STARTS).exists() else []
    newest = get_last_checkpoint(str(folder))
    is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM)
    if is_killed:
        score.kills[name] += 1
        score.torn += newest is not None and not Path(newest).is_symlink() and not step_of(Path(newest))
    elif starts and starts[-1] < known:
        score.losses.append(f"{name}, {folder.name}: resumed from {starts[-1]}, not {known}")
    if is_killed:
        return False
    score.runs += 1
    if os.WIFSIGNALED(status):
        score.losses.append(f"{name}, {folder.name}: died of signal {os.WTERMSIG(status)}")
    elif os.WEXITSTATUS(status):
        score.losses.append(f"{name}, {folder.name}: {(folder / ERROR).read_text()}")
    elif not training.equal(torch.load(folder / RESULT), expected.result):
        score.losses.append(f"{name}, {folder.name}: another result")
    return True


def harass(name: str, folder: Path, expected: Whole, generator: random.Random, score: Score, kills: int) -> None:
    """Restart one run until it is complete; kill it at random moments, at most twice, while there are kills left."""
    folder.mkdir()
    is_over, kills = False, min(kills, score.kills.total() + 2)
    while not is_over:
        known = whole(folder)
        looks_first = (
            known > 0 and generator.random() < 0.5
        )  # where nothing is whole, such a script is told to start again
        began = time.monotonic()
        child = forked(lambda looks_first=looks_first: train(name, folder, looks_first), folder)  # type: ignore[misc]
        patience = generator.uniform(0, 1.5 * expected.seconds) if score.kills.total() < kills else 600.0
        status = None
        while status is None and time.monotonic() - began < patience:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.002)
        if status is None:
            os.kill(child, generator.choice([signal.SIGKILL, signal.SIGTERM]))
            _, status = os.waitpid(child, 0)
        is_over = finished(name, folder, expected, status, known, score)


def strike(name: str, folder: Path, expected: Whole, looks_first: bool, score: Score) -> None:
    """Kill one run at each of the chosen moments, one start after the other, then let it finish."""
    folder.mkdir()
    for moment in (*MOMENTS, None):
        known = whole(folder)
        child = forked(lambda moment=moment: train(name, folder, looks_first, moment), folder)  # type: ignore[misc]
        _, status = os.waitpid(child, 0)
        if finished(name, folder, expected, status, known, score) and moment is not None:
            score.losses.append(f"{name}: was not killed {moment}")
            return


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    leave_libraries_alone()  # once, and not in every fork
    generator = random.Random(asked.seed)
    score = Score()
    known: dict[str, Whole] = {}
    order = generator.sample(list(METHODS), len(METHODS))
    with tempfile.TemporaryDirectory() as name_of_place:
        place = Path(name_of_place)
        while asked.each and score.runs < len(order):
            name = order[score.runs]
            strike(name, place / f"run-{score.runs}", undisturbed(name, place), bool(score.runs % 2), score)
        while not asked.each and score.kills.total() < asked.kills:
            name = min(order, key=lambda each: score.kills[each])
            known[name] = known[name] if name in known else undisturbed(name, place)
            harass(name, place / f"run-{score.runs}", known[name], generator, score, asked.kills)
    total = {"kills": score.kills.total(), "runs": score.runs, "torn": score.torn, "losses": len(score.losses)}
    print(json.dumps(total | {"methods": dict(sorted(score.kills.items()))}))
    print("\n".join(score.losses), end="")
    return 1 if score.losses else 0


if __name__ == "__main__":
    sys.exit(main())
