"""Weights & Biases, offline: the run's own file read back, record by record."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

import curves
import examples
import tokens
import torch
import training
import transformers as tf
import wandb
import zoo
from curves import METHODS
from untouched import differences, remove_all, snapshot

import softhooks
from softhooks import OptionError, PrefixTuning, PromptTuning, SoftHooksError, SoftPromptCallback, TrainerError
from softhooks.integrations.wandb import PromptArtifact

BLOCK = 32768

Runs = Callable[[], dict[str, list[Any]]]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all runs, because wandb reads its settings once."""
    folder = tmp_path_factory.mktemp("wandb")
    settings = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "LOG_MODEL": "false"}
    settings |= dict.fromkeys(("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"), str(folder))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()
        yield folder
        wandb.teardown()


@pytest.fixture
def runs(home: Path) -> Iterator[Runs]:
    """Finish the current run, and read this test's runs."""
    before = set(home.glob("wandb/offline-run-*"))

    def read() -> dict[str, list[Any]]:
        wandb.finish()
        deadline = time.monotonic() + 120
        while True:  # the service writes the last records when `finish` has returned
            folders = sorted(set(home.glob("wandb/offline-run-*")) - before)
            found = records(folders)
            if folders and len(found.get("exit", ())) == len(folders):
                return found
            assert time.monotonic() < deadline, (folders, list(found))
            time.sleep(0.05)

    yield read
    wandb.finish()
    remove_all()


def records(folders: list[Path]) -> dict[str, list[Any]]:
    """The complete records of some runs, by kind; the format is LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[Any]] = {}
    for path in (path for folder in folders for path in folder.glob("*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            if BLOCK - place % BLOCK < 7:
                place += BLOCK - place % BLOCK
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            if place + 7 + length > len(data):  # the service is still writing this one
                break
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                found.setdefault(record.WhichOneof("record_type"), []).append(record)
                whole = b""
    return found


def test_a_record_that_is_still_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record(exit=wandb_internal_pb2.RunExitRecord(exit_code=0, runtime=7))
    body = record.SerializeToString()
    data = b":W&B" + bytes(3) + (bytes(4) + struct.pack("<HB", len(body), 1) + body) * 2
    for size in range(7, len(data) + 1):
        (tmp_path / "run.wandb").write_bytes(data[:size])
        whole = (size - 7) // (7 + len(body))
        assert len(records([tmp_path]).get("exit", ())) == whole


def rows_of(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The lines of the run's history."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found["history"]
    ]


def drawn(found: dict[str, list[Any]]) -> dict[str, dict[int, float]]:
    """The curves by the reporter's step."""
    curve: dict[str, dict[int, float]] = {}
    for row in rows_of(found):
        for key, value in row.items():
            if isinstance(value, (int, float)) and "train/loss" in row:
                curve.setdefault(key, {})[row["train/global_step"]] = value
    return curve


def artifacts(found: dict[str, list[Any]]) -> dict[str, dict[str, Path]]:
    """The files of each artifact."""
    return {
        ":".join([record.artifact.type, record.artifact.name, *sorted({*record.artifact.aliases} - {"latest"})]): {
            entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents
        }
        for record in found.get("artifact", ())
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_curves_reach_the_run_by_themselves(tmp_path: Path, name: str, runs: Runs) -> None:
    method, names = METHODS[name]
    trainer, _ = curves.train(tmp_path / "out", method, report_to=["wandb"])
    curves.require_equal(drawn(runs()), curves.expected(trainer, names, "train/"))


def test_the_run_holds_the_prompt_its_words_and_what_it_is(tmp_path: Path, runs: Runs, home: Path) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    report = PromptArtifact(tokens.tokenizer(), words=2)
    trainer, callback = curves.train(tmp_path / "out", PromptTuning(4), report, model=model, report_to=["wandb"])
    run = wandb.run.id
    assert training.equal(training.base_of(model), base)
    assert callback.soft_prompt is not None
    near = softhooks.nearest_words(callback.soft_prompt, tokens.tokenizer(), 2)
    found = runs()
    curves.require_equal(drawn(found), curves.expected(trainer, curves.BASIC, "train/"))
    config = {item.key: item.value_json for record in found["config"] for item in record.config.update}
    about = json.loads(config["soft_prompt"])
    assert about["method"] == "prompt_tuning"
    assert about["parameters"] == 128

    [path] = [row["soft_prompt/words/path"] for row in rows_of(found) if "soft_prompt/words/path" in row]
    [file] = home.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    assert content["columns"] == ["virtual token", "rank", "word", "cosine"]
    assert content["data"] == [
        [number, rank, word.token, round(word.cosine, 4)]
        for number, row in enumerate(near)
        for rank, word in enumerate(row)
    ]

    files = artifacts(found)[f"soft-prompt:soft-prompt-{run}:step-4"]
    assert set(files) == {"soft_prompt.json", "soft_prompt.safetensors"}
    for name, path in files.items():
        shutil.copyfile(path, tmp_path / name)
    fresh = zoo.build("llama")
    softhooks.load(fresh, tmp_path)
    batch = tf.default_data_collator(training.rows("causal"))
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.filterwarnings("ignore:.*is currently set to the same value")
@pytest.mark.parametrize("when", ["checkpoint", "end"])
def test_the_reporters_own_artifacts_hold_the_prompt_only(
    tmp_path: Path, when: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", when)
    _, callback = curves.train(
        tmp_path / "out", PromptTuning(4), report_to=["wandb"], save_strategy="steps", save_steps=2
    )
    assert callback.report is not None
    found = artifacts(runs())
    last = {"checkpoint": "checkpoint_global_step_4", "end": "final_model"}[when]
    [files] = [files for name, files in found.items() if last in name.split(":")]
    assert "soft_prompt.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & set(files)
    assert sum(path.stat().st_size for path in files.values()) < 60_000


def test_the_trials_of_a_search_have_a_run_each(tmp_path: Path, runs: Runs) -> None:
    pytest.importorskip("optuna").logging.set_verbosity(40)
    callbacks = [SoftPromptCallback(PromptTuning(4)), PromptArtifact()]
    trainer = training.make(
        tmp_path / "out",
        None,
        "causal",
        callbacks,
        given={"model_init": lambda: zoo.build("llama")},
        report_to=["wandb"],
    )
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        backend="optuna", n_trials=2, direction="minimize",
    )  # fmt: skip
    found = runs()
    assert len(found["exit"]) == 2
    assert len([name for name in artifacts(found) if name.startswith("soft-prompt:")]) == 2
    configured = [item.key for record in found["config"] for item in record.config.update]
    assert configured.count("soft_prompt") == 2


def test_what_is_refused(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    for method, report, options, words in (
        (PromptTuning(4), PromptArtifact(), {}, "no active Weights & Biases run"),
        (
            PrefixTuning(4),
            PromptArtifact(tokens.tokenizer()),
            {"report_to": ["wandb"]},
            "instead of embeddings, so it cannot be compared with words",
        ),
    ):
        trainer = training.make(tmp_path / "out", model, "causal", [SoftPromptCallback(method), report], **options)  # type: ignore[arg-type]
        before = snapshot(model)
        with pytest.raises((TrainerError, OptionError), match=words):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not [name for name in differences(before, snapshot(model)) if name.startswith("tensor")]
        remove_all()
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[wandb\]"'):
        PromptArtifact()


def test_the_example_runs(runs: Runs) -> None:
    names = examples.run("wandb")
    assert len(training.losses(names["trainer"])) == 4
    assert len([name for name in artifacts(runs()) if name.startswith("soft-prompt:")]) == 1
