"""Whole runs of the MetaMathQA benchmark, of a tiny random Llama on a stand-in for the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from metamath_stand_in import write_data, write_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import softhooks

pytest.importorskip("datasets")
pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.metamath import __main__ as command  # noqa: E402
from benchmarks.metamath import experiment, record, training  # noqa: E402

QUICK = {
    "max_steps": 2, "eval_steps": 1, "batch_size": 2, "batch_size_eval": 4, "dtype": "float32",
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 3},
}  # fmt: skip
_NUMBER, _TEXT, _TEXT_OR_NONE = (float,), (str,), (str, type(None))
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
SCHEMA: dict[str, dict[str, tuple[type, ...]]] = {
    "run_info": {
        "created_at": _TEXT, "total_time": _NUMBER, "experiment_name": _TEXT, "peft_branch": _TEXT,
        "peft_worktree_is_dirty": (bool,), "train_config": (dict,), "peft_config": (dict,), "error_msg": _TEXT,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": (int,), "accelerator_memory_max": (int,),
        "accelerator_memory_reserved_99th": (int,), "train_time": _NUMBER, "file_size": (int,),
        "num_trainable_params": (int,), "num_total_params": (int,), "status": _TEXT, "metrics": (list,),
    },
    "evaluation": {
        "step": (int,), "valid accuracy": _NUMBER, "train loss": _NUMBER, "train samples": (int,),
        "train time": _NUMBER, "eval time": _NUMBER, "tokens / sec": _NUMBER, "mem allocated avg": _NUMBER,
        "mem reserved avg": _NUMBER, "elapsed time": _NUMBER,
    },
    "test": {
        "step": (int,), "test accuracy": _NUMBER, "train loss": _NUMBER, "train samples": (int,),
        "train total tokens": (int,), "forgetting": _NUMBER,
    },
    "meta_info": {
        "model_info": (dict,), "dataset_info": (dict,), "package_info": (dict,), "system_info": (dict,),
        "pytorch_info": _TEXT,
    },
    "hub": {"sha": _TEXT_OR_NONE, "created_at": _TEXT_OR_NONE},
    "package_info": {f"{name}-{part}": _TEXT_OR_NONE for name in PACKAGES for part in ("version", "commit-hash")},
    "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"), _TEXT),
}  # fmt: skip
"""The keys of PEFT's result files and the types of their values. softhooks adds its own package to `package_info`."""


class StandIn:
    """Runs experiments on the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.model, self.rows = (folder / name for name in ("model", "data"))
        self.rows.mkdir()
        write_model(self.model)
        write_data(self.rows)

    def run(self, name: str, output: Path, **changes: Any) -> Result:
        sets = [f"--set={key}={json.dumps(value)}" for key, value in {**QUICK, **changes}.items()]
        places = [f"--model={self.model}", f"--dataset-dir={self.rows}", f"--output={output}"]
        return invoke("--experiment", name, *places, *sets)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment after the command has changed it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(tmp_path_factory.mktemp("stand_in"))


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments)


def only_result(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def assert_schema(found: dict[str, Any], part: str, *more: str) -> None:
    expected = SCHEMA[part]
    assert set(found) == set(expected) | set(more)
    assert {key: found[key] for key, types in expected.items() if not isinstance(found[key], types)} == {}


TRAINED = {
    "prompt-tuning": 200 * 16,
    "prefix-tuning": 2 * 2 * 8 * 50,
    "p-tuning": 20 * 16 + 2 * (16 * 16 + 16),
    "p-tuning-v2": 2 * 2 * 8 * 50,
    "llama-adapter": 2 * (100 * 16 + 1),
    "lora": 2 * 32 * ((16 + 16) + (16 + 8)),
}
"""The number of trained parameters of each experiment on the stand-in."""


@pytest.mark.parametrize("name", [*TRAINED, "cpt"])
def test_every_experiment_runs_and_writes_peft_s_format(stand_in: StandIn, tmp_path: Path, name: str) -> None:
    done = stand_in.run(name, tmp_path)
    assert done.exit_code == 0, done.output
    assert "test accuracy 0.000" in done.output
    assert not (tmp_path / "results").exists()  # only runs with the settings of the experiment
    result = only_result(tmp_path / "temporary_results")
    assert set(result) == {"run_info", "train_info", "meta_info"}
    run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
    assert_schema(run, "run_info")
    assert_schema(train, "train_info")
    assert_schema(meta, "meta_info")
    for evaluation in train["metrics"][:-1]:
        assert_schema(evaluation, "evaluation")
    assert_schema(train["metrics"][-1], "test")
    assert set(meta["dataset_info"]) == {"metamath", "gsm8k"}
    for hub in (meta["model_info"], *meta["dataset_info"].values()):
        assert_schema(hub, "hub")
    assert_schema(meta["package_info"], "package_info", "softhooks-version", "softhooks-commit-hash")
    assert_schema(meta["system_info"], "system_info")

    assert (train["status"], run["error_msg"]) == ("success", "")
    assert [entry["step"] for entry in train["metrics"]] == [1, 2, 2]
    assert [entry["train samples"] for entry in train["metrics"]] == [2, 4, 4]
    assert run["train_config"] == {
        **run["train_config"], **QUICK, "model_id": str(stand_in.model), "max_seq_length": 768
    }  # fmt: skip
    assert run["experiment_name"].endswith(experiment.choose([name], every=False)[0])
    assert isinstance(run["peft_config"]["peft_type"], str)
    assert train["num_trainable_params"] == TRAINED.get(name, train["num_trainable_params"]) > 0
    assert 0 < train["train_time"] < run["total_time"]
    assert train["file_size"] > 0
    assert 0 < train["accelerator_memory_reserved_avg"] <= train["accelerator_memory_max"]


def test_runs_are_reproducible_and_learn(stand_in: StandIn, tmp_path: Path) -> None:
    metrics = []
    for folder in ("a", "b"):
        done = stand_in.run("prefix-tuning", tmp_path / folder, max_steps=8, eval_steps=2, lr_scheduler=None)
        assert done.exit_code == 0, done.output
        metrics.append(only_result(tmp_path / folder / "temporary_results")["train_info"]["metrics"])
    assert [m["train loss"] for m in metrics[0]] == [m["train loss"] for m in metrics[1]]
    assert metrics[0][-1]["train loss"] < metrics[0][0]["train loss"]
    assert metrics[0][-1]["forgetting"] == metrics[1][-1]["forgetting"] != 0


def test_a_failed_run_is_recorded(stand_in: StandIn, tmp_path: Path) -> None:
    done = stand_in.run("prompt-tuning", tmp_path, max_steps=50)
    assert done.exit_code == 1
    result = only_result(tmp_path / "cancelled_results")
    assert result["train_info"]["status"] == "failed"
    assert "there are 20 training rows, but max_steps=50 with batch_size=2 needs 100" in result["run_info"]["error_msg"]
    assert_schema(result["train_info"], "train_info")


def test_a_model_that_does_not_load_is_recorded(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = invoke(
        "--experiment=lora", f"--model={tmp_path / 'empty'}", f"--dataset-dir={stand_in.rows}", f"--output={tmp_path}"
    )
    assert done.exit_code == 1
    result = only_result(tmp_path / "cancelled_results")
    assert (result["train_info"]["status"], result["run_info"]["peft_config"]) == ("failed", None)
    assert_schema(result["train_info"], "train_info")


def test_a_canceled_run_is_recorded(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training.Training._step

    def second_step_is_canceled(self: training.Training, rows: list[list[int]]) -> None:
        if self.log.losses:
            raise KeyboardInterrupt
        step(self, rows)

    monkeypatch.setattr(training.Training, "_step", second_step_is_canceled)
    assert stand_in.run("prompt-tuning", tmp_path).exit_code == 130
    train = only_result(tmp_path / "cancelled_results")["train_info"]
    assert (train["status"], len(train["metrics"])) == ("canceled", 1)
    assert train["num_trainable_params"] == TRAINED["prompt-tuning"]


def test_a_run_that_changes_the_base_model_fails(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = training.Training._test

    def test_and_change_a_weight(self: training.Training, before: float) -> None:
        test(self, before)
        self.contestant.model.lm_head.weight.data[0, 0] += 1

    monkeypatch.setattr(training.Training, "_test", test_and_change_a_weight)
    assert stand_in.run("prompt-tuning", tmp_path).exit_code == 1
    assert "FrozenModifiedError" in only_result(tmp_path / "cancelled_results")["run_info"]["error_msg"]


def test_kept_checkpoints_are_prompts(stand_in: StandIn, tmp_path: Path) -> None:
    done = invoke(
        "--experiment=prompt-tuning", f"--model={stand_in.model}", f"--dataset-dir={stand_in.rows}", f"--output={tmp_path}",
        f"--checkpoints={tmp_path / 'kept'}", *(f"--set={key}={json.dumps(value)}" for key, value in QUICK.items()),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(stand_in.model)
    label = only_result(tmp_path / "temporary_results")["run_info"]["experiment_name"]
    assert softhooks.load(model, tmp_path / "kept" / label).num_parameters == TRAINED["prompt-tuning"]


def test_results_with_the_settings_of_the_experiment_are_kept_apart(tmp_path: Path) -> None:
    result = {
        "run_info": {"experiment_name": "softhooks-lora/x", "created_at": "2026-01-01T10:00:00+00:00"},
        "train_info": {"status": "success"},
    }
    assert record.write(result, tmp_path, with_defaults=True) == tmp_path / "results" / "softhooks-lora--x.json"
    stamped = "softhooks-lora--x--2026-01-01T10-00-00+00-00.json"
    assert record.write(result, tmp_path, with_defaults=False) == tmp_path / "temporary_results" / stamped


def test_all_runs_each_experiment_in_its_own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def fail_for_lora(arguments: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, int("lora" in arguments[4]))

    monkeypatch.setattr(subprocess, "run", fail_for_lora)
    done = invoke("--all", "--set", "max_steps=4", f"--output={tmp_path}")
    assert done.exit_code == 1
    assert "failed: lora/llama-3.2-3B-rank32" in done.output
    assert [arguments[4] for arguments in commands] == experiment.names()
    assert all(arguments[5:] == ["--set", "max_steps=4", f"--output={tmp_path}"] for arguments in commands)


@pytest.mark.parametrize("arguments", [["--experiment", "bitfit"], [], ["--experiment", "lora", "--set", "steps=3"]])
def test_wrong_arguments_exit_with_status_2(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert (done.exit_code, done.output[:7]) == (2, "Error: ")


@pytest.mark.parametrize("argument", ["--help", "--list"])
def test_help_and_list_do_not_import_torch(argument: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['metamath', {argument!r}]\n"
        "try:\n    runpy.run_module('benchmarks.metamath', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("--dataset-dir" if argument == "--help" else "prompt-tuning/llama") in done.stdout
