"""MLflow, in local files: metrics, parameters and artifacts, read back by MLflow's own client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

import curves
import examples
import mlflow
import tokens
import torch
import training
import transformers as tf
import zoo
from curves import METHODS
from untouched import differences, remove_all, snapshot

import softhooks
from softhooks import OptionError, PrefixTuning, PromptTuning, SoftHooksError, SoftPromptCallback, TrainerError
from softhooks.integrations.mlflow import PromptArtifact

pytestmark = [
    pytest.mark.filterwarnings("ignore:The filesystem tracking backend:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The filesystem model registry backend:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")  # its threads race for a metric's folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(None)
    remove_all()


def runs() -> list[Any]:
    """The store's runs, oldest first."""
    mlflow.flush_async_logging()
    return list(reversed(mlflow.MlflowClient().search_runs(["0"])))


def drawn(run: Any) -> dict[str, dict[int, float]]:
    client = mlflow.MlflowClient()
    return {
        key: {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        for key in run.data.metrics
    }


def downloaded(run: Any, path: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=path))


@pytest.mark.parametrize("name", METHODS)
def test_the_curves_reach_the_run_by_themselves(tmp_path: Path, name: str) -> None:
    method, names = METHODS[name]
    trainer, _ = curves.train(tmp_path / "out", method, report_to=["mlflow"])
    [run] = runs()
    curves.require_equal(drawn(run), curves.expected(trainer, names))
    assert run.info.status == "FINISHED"
    assert run.data.params["max_steps"] == "4"


def test_the_run_holds_the_prompt_its_words_and_what_it_is(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    report = PromptArtifact(tokens.tokenizer(), words=2)
    trainer, callback = curves.train(tmp_path / "out", PromptTuning(4), report, model=model, report_to=["mlflow"])
    assert training.equal(training.base_of(model), base)
    [run] = runs()
    curves.require_equal(drawn(run), curves.expected(trainer, curves.BASIC))
    assert run.data.params["soft_prompt.method"] == "prompt_tuning"
    assert run.data.params["soft_prompt.num_virtual_tokens"] == "4"
    assert run.data.params["soft_prompt.parameters"] == "128"

    assert callback.soft_prompt is not None
    near = softhooks.nearest_words(callback.soft_prompt, tokens.tokenizer(), 2)
    lines = [line.split("\t") for line in downloaded(run, "soft_prompt_words.tsv").read_text().splitlines()]
    assert lines[0] == ["virtual token", "rank", "word", "cosine"]
    assert lines[1:] == [
        [str(number), str(rank), word.token, str(round(word.cosine, 4))]
        for number, row in enumerate(near)
        for rank, word in enumerate(row)
    ]
    fresh = zoo.build("llama")
    softhooks.load(fresh, downloaded(run, "soft_prompt"))
    batch = tf.default_data_collator(training.rows("causal"))
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)


def test_files_are_kept_while_the_curves_are_still_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append_slowly(path: str, line: str) -> None:
        with Path(path).open("a") as file:
            time.sleep(0.02)
            file.write(line)

    monkeypatch.setattr("mlflow.store.tracking.file_store.append_to", append_slowly)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run():  # which stays open, so that nothing waits for its curves
        trainer, _ = curves.train(tmp_path / "out", PromptTuning(4), PromptArtifact(), report_to=["mlflow"])
    [run] = runs()
    curves.require_equal(drawn(run), curves.expected(trainer, curves.BASIC))
    assert (downloaded(run, "soft_prompt") / "soft_prompt.safetensors").is_file()


def test_a_long_option_is_cut_and_whole_in_the_artifact(tmp_path: Path) -> None:
    method = PromptTuning(4, init="text", init_text="word20 " * 2000, tokenizer=tokens.tokenizer())
    curves.train(tmp_path / "out", method, PromptArtifact(), report_to=["mlflow"])
    [run] = runs()
    assert run.data.params["soft_prompt.init_text"].endswith("...")
    assert "word20 " * 2000 in (downloaded(run, "soft_prompt") / "soft_prompt.json").read_text()


def test_a_run_of_the_scripts_own_is_added_to_and_left_open(tmp_path: Path) -> None:
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as mine:
        curves.train(tmp_path / "out", PromptTuning(4), PromptArtifact())
        assert mlflow.active_run() is not None
        curves.train(tmp_path / "again", PromptTuning(4), PromptArtifact())
    [run] = runs()
    assert run.info.run_id == mine.info.run_id
    assert (downloaded(run, "soft_prompt") / "soft_prompt.safetensors").is_file()


@pytest.mark.parametrize(
    ("inside", "evaluates"),
    [(False, False), (True, True)],
    ids=["evaluated afterwards", "inside a run, while training"],
)
def test_the_trials_of_a_search_have_a_run_each(tmp_path: Path, inside: bool, evaluates: bool) -> None:
    pytest.importorskip("optuna").logging.set_verbosity(40)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    outer = mlflow.start_run() if inside else None
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4} if evaluates else {}
    callbacks = [SoftPromptCallback(PromptTuning(4)), PromptArtifact()]
    given = {"model_init": lambda: zoo.build("llama")}
    trainer = training.make(tmp_path / "out", None, "causal", callbacks, given=given, report_to=["mlflow"], **options)
    rates: list[float] = []

    def space(trial: Any) -> dict[str, float]:
        rates.append(trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True))
        return {"learning_rate": rates[-1]}

    trainer.hyperparameter_search(space, backend="optuna", n_trials=3, direction="minimize")
    assert mlflow.active_run() is not None
    mlflow.end_run()
    found = runs()
    if outer is not None:
        assert mlflow.active_run().info.run_id == outer.info.run_id
        assert all(run.data.tags["mlflow.parentRunId"] == outer.info.run_id for run in found[1:])
        del found[0]
    assert len(found) == 3
    assert [float(run.data.params["learning_rate"]) for run in found] == rates
    for run in found:
        assert run.info.status == "FINISHED"
        assert len(drawn(run)["soft_prompt/norm"]) == 4
        assert len(drawn(run)["eval_loss"]) == 1
        assert (downloaded(run, "soft_prompt") / "soft_prompt.safetensors").is_file()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")

    def refused(method: Any, report: PromptArtifact, words: str, **options: Any) -> None:
        trainer = training.make(tmp_path / "out", model, "causal", [SoftPromptCallback(method), report], **options)
        before = snapshot(model)
        with pytest.raises((TrainerError, OptionError), match=words):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not [name for name in differences(before, snapshot(model)) if name.startswith("tensor")]
        remove_all()

    refused(PromptTuning(4), PromptArtifact(), "no active MLflow run")
    refused(
        PrefixTuning(4),
        PromptArtifact(tokens.tokenizer()),
        "instead of embeddings, so it cannot be compared with words",
        report_to=["mlflow"],
    )
    monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", "1")
    refused(
        PromptTuning(4),
        PromptArtifact(),
        r"HF_MLFLOW_LOG_ARTIFACTS=1 would log each checkpoint as a `pyfunc` model",
        report_to=["mlflow"],
    )
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[mlflow\]"'):
        PromptArtifact()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = examples.run("mlflow")
    assert len(training.losses(names["trainer"])) == 4
    [run] = runs()
    assert (downloaded(run, "soft_prompt") / "soft_prompt.json").is_file()
