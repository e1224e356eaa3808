"""Runs that are killed or run out of disk: the last complete checkpoint is found, and nothing else is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from table import LEARNERS
from transformers.trainer_utils import get_last_checkpoint
from untouched import remove_all

from softhooks import PrefixTuning, SoftPromptCallback
from softhooks.trainer.incomplete_checkpoints import LOCK, Lock, find_damage, rename_incomplete, replacement_links

METHOD = PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1)
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
WRITTEN = [
    LOCK, "soft_prompt.safetensors", "soft_prompt.json", "soft_prompt.live.safetensors", "model.safetensors.index.json",
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
]  # fmt: skip
"""The files of a checkpoint, in the order in which they are written; the first goes when all are there."""

OWN = WRITTEN[:5]
"""Files that are renamed into place."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@dataclass(frozen=True)
class Run:
    """A run that was not killed."""

    folder: Path
    trained: dict[str, torch.Tensor]
    losses: list[float]


def start(folder: Path, **options: Any) -> tuple[tf.Trainer, SoftPromptCallback]:
    return training.prompted(folder, zoo.build("bert", "sequence"), "sequence", METHOD, **{**SAVING, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    trainer, callback = start(folder)
    trainer.train()
    return Run(folder, training.trained(callback), training.losses(trainer))


def killed(run: Run, folder: Path, at: str, torn: bool) -> Path:
    """The folder left by a process that dies before or in the middle of writing one file of the last checkpoint."""
    shutil.copytree(run.folder, folder)
    last = folder / "checkpoint-4"
    (last / LOCK).touch()
    assert {file.name for file in last.iterdir()} == set(WRITTEN)
    for name in WRITTEN[WRITTEN.index(at) :]:
        file = last / name
        half = file.read_bytes()[: file.stat().st_size // 2]
        file.unlink()
        if torn and name == at:
            (last / f".{name}.0a1b2c3d" if name in OWN else file).write_bytes(half)
    return folder


def finish(run: Run, folder: Path, looks_first: bool = False) -> list[str]:
    """Restart, and compare with the run that was not killed.

    Args:
        looks_first: whether the script looks for the last checkpoint before it makes its Trainer, as transformers' examples do.
    """
    last = get_last_checkpoint(str(folder)) if looks_first else True
    with training.logged() as messages:
        trainer, callback = start(folder)
    training.spoil(callback)
    trainer.train(resume_from_checkpoint=last)
    assert training.losses(trainer) == run.losses
    assert training.equal(training.trained(callback), run.trained)
    return messages


@pytest.mark.parametrize("torn", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("at", WRITTEN)
def test_a_kill_at_every_file(run: Run, tmp_path: Path, at: str, torn: bool) -> None:
    folder = killed(run, tmp_path / "run", at, torn)
    messages = finish(run, folder)
    assert any("checkpoint-4 is incomplete (trainer_state.json is" in message for message in messages)
    assert any(message.endswith("is checkpoint-3") for message in messages)
    assert (folder / "incomplete-checkpoint-4").is_dir(), "nothing is deleted"
    assert find_damage(folder / "checkpoint-4") is None
    assert not [file for file in folder.rglob(LOCK) if "incomplete" not in str(file)]


def test_a_kill_after_the_last_file(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "checkpoint-4" / LOCK).touch()
    assert not rename_incomplete(folder), "it is whole, and older ones may be gone already"
    assert not finish(run, folder)


@pytest.mark.parametrize(
    "name", ["soft_prompt.safetensors", "soft_prompt.live.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_file_that_is_cut_off_though_the_last_one_is_whole(run: Run, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    file = folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-100])
    assert any(f"{name} is truncated" in message for message in finish(run, folder))


def test_several_kills_in_a_row(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1.')
    (folder / "checkpoint-5").mkdir()
    finish(run, folder)
    assert sorted(entry.name for entry in folder.glob("incomplete-*")) == [
        f"incomplete-checkpoint-{n}" for n in (3, 4, 5)
    ]
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    finish(run, folder)
    assert (folder / "incomplete-checkpoint-4.2").is_dir()


def test_all_of_them_killed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    assert [folder.name for folder in rename_incomplete(tmp_path)] == ["incomplete-checkpoint-1"]
    assert not rename_incomplete(tmp_path)
    assert not rename_incomplete(tmp_path / "nowhere")
    trainer, callback = start(tmp_path)
    trainer.train()
    assert training.equal(training.trained(callback), run.trained)


# --- a script that has looked already ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [LOCK, "soft_prompt.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_script_that_has_looked_before_resumes_at_once(run: Run, tmp_path: Path, at: str) -> None:
    folder = killed(run, tmp_path / "run", at, torn=True)
    whole = {file.name: file.read_bytes() for file in (folder / "checkpoint-3").iterdir()}
    messages = finish(run, folder, looks_first=True)
    assert any("until the first step, checkpoint-4 is a link to this checkpoint" in message for message in messages)
    assert not replacement_links(folder)
    assert find_damage(folder / "checkpoint-4") is None
    assert {file.name: file.read_bytes() for file in (folder / "checkpoint-3").iterdir()} == whole


def test_a_link_serves_until_the_first_step(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    start(folder)
    assert (folder / "checkpoint-4").readlink() == Path("checkpoint-3"), "this start was killed before its first step"

    class Look(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(replacement_links(folder))

    seen: list[list[Path]] = []
    trainer, callback = start(folder)
    trainer.add_callback(Look())
    assert (folder / "checkpoint-4").is_symlink()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    assert seen == [[]], "gone before anything is written, and one step was left to do"
    assert training.equal(training.trained(callback), run.trained)
    assert not (folder / "checkpoint-4").is_symlink()


def test_a_link_that_leads_nowhere_goes(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    rename_incomplete(folder)
    shutil.rmtree(folder / "checkpoint-3")
    finish(run, folder)
    assert find_damage(folder / "checkpoint-4") is None


def test_nothing_is_written_through_a_link(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    rename_incomplete(folder)
    Lock(folder / "checkpoint-4").release()
    assert not (folder / "checkpoint-4").is_symlink()
    assert find_damage(folder / "checkpoint-3") is None


@pytest.mark.parametrize("links", [True, False], ids=["nothing whole", "no links"])
def test_a_script_that_cannot_be_helped_is_told_what_to_do(
    run: Run, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if links:
        (tmp_path / "checkpoint-1").mkdir()
    else:
        killed(run, tmp_path / "run", "optimizer.pt", torn=True)
        monkeypatch.setattr(Path, "symlink_to", _full)
    folder = tmp_path if links else tmp_path / "run"
    last = get_last_checkpoint(str(folder))
    with training.logged() as messages:
        trainer, _ = start(folder)
    assert any(message.endswith("to the Trainer cannot resume; start it again") for message in messages)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer.train(resume_from_checkpoint=last)
    assert get_last_checkpoint(str(folder)) == (None if links else str(folder / "checkpoint-3"))


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_being_written_is_left_alone(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    with (folder / "checkpoint-4" / LOCK).open("w") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        start(folder)
        assert (folder / "checkpoint-4").is_dir()
    assert len(rename_incomplete(folder)) == 1, "the writer is gone"


def test_checkpoints_of_others_are_left_alone(run: Run, tmp_path: Path) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    for number in (6, 7):
        (folder / f"checkpoint-{number}").mkdir()
        (folder / f"checkpoint-{number}" / "model.safetensors").touch()
    assert not rename_incomplete(folder)
    assert (folder / "checkpoint-4").is_dir(), "and those before them"


def test_only_the_process_that_saves_sets_aside(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = killed(run, tmp_path / "run", "optimizer.pt", torn=True)
    monkeypatch.setattr(tf.TrainingArguments, "should_save", property(lambda self: False))
    start(folder)
    assert (folder / "checkpoint-4").is_dir()


def test_a_checkpoint_that_is_written_over_is_not_whole_until_its_end(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    lock = Lock(folder / "checkpoint-4")
    assert find_damage(folder / "checkpoint-4") == "trainer_state.json is missing"
    assert (folder / "checkpoint-4" / LOCK).exists()
    lock.release()
    lock.release()
    assert not (folder / "checkpoint-4" / LOCK).exists()


# --- the disk is full -------------------------------------------------------------------------------------------------


def _full(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "what", ["os.replace", "os.fsync", "torch.save", "json.dump", "transformers.TrainerState.save_to_json"]
)
def test_a_full_disk_costs_the_last_checkpoint_only(run: Run, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"

    class Full(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and what != "json.dump":
                patch.setattr(what, _full)
            elif state.global_step == 3:
                patch.setattr("softhooks.saving.live_state.write_json", _full)

    with pytest.MonkeyPatch.context() as patch:
        model = zoo.build("bert", "sequence")
        trainer = training.make(folder, model, "sequence", [SoftPromptCallback(METHOD), Full()], **SAVING)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    whole = {file.name: file.read_bytes() for file in (folder / "checkpoint-2").iterdir()}
    assert find_damage(folder / "checkpoint-2") is None
    assert any("checkpoint-3 is incomplete" in message for message in finish(run, folder)), "in the same process too"
    assert {file.name: file.read_bytes() for file in (folder / "checkpoint-2").iterdir()} == whole


# --- every method -----------------------------------------------------------------------------------------------------


def harassed(*arguments: str) -> dict[str, Any]:
    """Run the script that kills, and read its score."""
    done = subprocess.run(
        [sys.executable, str(Path(training.__file__).parent / "kills.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    score: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    assert score["losses"] == 0
    assert score["kills"] == sum(score["methods"].values())
    return score


def test_every_method_killed_before_its_constraint_and_within_a_checkpoint() -> None:
    score = harassed("--each")
    assert score["methods"] == {entry.name: 2 for entry in LEARNERS}
    assert score["torn"] == score["runs"] == len(LEARNERS)


def test_kills_at_random_moments() -> None:
    score = harassed("--kills", "4", "--seed", "3")
    assert score["kills"] == 4
    assert score["runs"] >= 1
