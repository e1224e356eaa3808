"""Training logs of a prompt: its numbers in every log and every reporter, and one line at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from table import LEARNERS, Entry
from transformers.trainer_callback import CallbackHandler
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, SoftPromptCallback
from softhooks.prompt_encoder import PromptEncoder, TableEncoder

BARE_ON_LOG = CallbackHandler.on_log
KEYS = {"soft_prompt/norm", "soft_prompt/grad_norm", "soft_prompt/distance"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()
    assert CallbackHandler.on_log is BARE_ON_LOG, "the handler's method must be its own again"


class Reporter(tf.TrainerCallback):
    """A reporter like TensorBoard's, called before any user callback."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Gradients(tf.TrainerCallback):
    """Compute the expected logs by hand at every step."""

    def __init__(self, start: softhooks.SoftPrompt) -> None:
        self.prompt = start
        self.start = self._flat()
        self.norms: list[float] = []
        self.shown: list[tuple[float, float]] = []

    def _flat(self) -> torch.Tensor:
        return torch.cat([table.flatten() for table in self.prompt.encoder.folded().values()])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in self.prompt.encoder.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.append((float(self._flat().norm()), float((self._flat() - self.start).norm())))


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """A reporter at the place where `report_to` puts its callbacks: after the flow callback, before the user's."""
    found = Reporter()
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [found])
    return found


@pytest.mark.parametrize("entry", LEARNERS, ids=str)
def test_the_numbers_reach_reporters(tmp_path: Path, reporter: Reporter, entry: Entry) -> None:
    trainer, callback = training.learning(
        tmp_path, entry, max_steps=6, logging_steps=2, max_grad_norm=0.05, eval_strategy="steps", eval_steps=3
    )
    assert trainer.callback_handler.callbacks.index(reporter) < trainer.callback_handler.callbacks.index(callback)
    assert callback.soft_prompt is not None
    expected = Gradients(callback.soft_prompt)
    trainer.add_callback(expected)
    trainer.train()
    steps = [log for log in reporter.logs if "loss" in log]
    assert len(steps) == 3
    for number, log in enumerate(steps):
        step = 2 * number + 1
        assert set(log) >= KEYS
        assert log["soft_prompt/grad_norm"] == pytest.approx(expected.norms[step], rel=1e-5)
        assert log["soft_prompt/norm"] == pytest.approx(expected.shown[step][0], rel=1e-5)
        assert log["soft_prompt/distance"] == pytest.approx(expected.shown[step][1], rel=1e-5)
        assert all(type(value) is float for key, value in log.items() if key in KEYS)
    assert steps[-1]["soft_prompt/distance"] > 0
    others = [log for log in reporter.logs if "loss" not in log]
    assert others
    assert not any(key.startswith("soft_prompt/") for log in others for key in log), "only what a step has trained"
    kept = [{key: log[key] for key in KEYS} for log in training.logs(trainer)]
    assert kept == [{key: log[key] for key in KEYS} for log in steps], "the Trainer's history has them too"


def test_the_printed_log_and_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        callback = SoftPromptCallback(PromptTuning(4))
        arguments = {**training.QUIET, "disable_tqdm": quiet}
        model = zoo.build("llama")
        args = tf.TrainingArguments(str(tmp_path), **arguments)
        trainer = tf.Trainer(model=model, args=args, train_dataset=training.rows("causal"), callbacks=[callback])  # type: ignore[arg-type]
        capsys.readouterr()
        trainer.train()
        out, err = capsys.readouterr()
        assert out.count("'soft_prompt/norm': ") == 4
        [line] = [line for line in out.splitlines() if line.startswith("soft prompt")]
        assert line.startswith(
            "soft prompt 'default': 128 parameters trained; nothing else changed (frozen: 23 tensors, "
        )
        assert ("4/4" in err) == (not quiet), "the bar runs to its end"
        assert "soft_prompt" not in err
        remove_all()


class Gated(TableEncoder):
    asked = 0

    def metrics(self) -> dict[str, float]:
        type(self).asked += 1
        return {"gate": 0.25, "projected": float(self.asked)}


class Gating(PromptTuning):
    def build(self, structure: Any) -> PromptEncoder:
        return Gated(super().build(structure).folded())


def test_a_method_shows_numbers_of_its_own_where_a_log_is_due(tmp_path: Path, reporter: Reporter) -> None:
    Gated.asked = 0
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", Gating(4), logging_steps=2, max_steps=5)
    trainer.train()
    steps = [log for log in reporter.logs if "loss" in log]
    assert [log["soft_prompt/gate"] for log in steps] == [0.25] * 2
    assert [log["soft_prompt/projected"] for log in steps] == [1.0, 2.0]
    assert Gated.asked == 2, "nothing is computed between logs"
    assert PromptEncoder().metrics() == {}


def test_nothing_is_folded_between_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, callback = training.prompted(
        tmp_path, zoo.build("llama"), "causal", PrefixTuning(4, projection=True), logging_steps=3, max_steps=7
    )
    assert callback.soft_prompt is not None
    folds: list[int] = []
    encoder = callback.soft_prompt.encoder
    original = encoder.folded
    monkeypatch.setattr(encoder, "folded", lambda: folds.append(trainer.state.global_step) or original())
    trainer.train()
    assert folds == [3, 6]


def test_two_trainers_show_each_its_own(tmp_path: Path) -> None:
    one, _ = training.prompted(tmp_path / "1", zoo.build("llama"), "causal", PromptTuning(4))
    other, callback = training.prompted(tmp_path / "2", zoo.build("llama"), "causal", PrefixTuning(2))
    bare = training.make(tmp_path / "3", zoo.build("llama"), "causal", [])
    for trainer in (one, other, bare):
        trainer.train()
    assert training.logs(one)[-1]["soft_prompt/norm"] != training.logs(other)[-1]["soft_prompt/norm"]
    assert not any(key.startswith("soft_prompt") for log in bare.state.log_history for key in log)
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    assert CallbackHandler.on_log is not BARE_ON_LOG, "the first prompt is still there"


def test_models_that_are_dropped_let_the_handler_go(tmp_path: Path) -> None:
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", PromptTuning(4))
    trainer.train()
    assert CallbackHandler.on_log is not BARE_ON_LOG
    del trainer, callback
    gc.collect()
    assert CallbackHandler.on_log is BARE_ON_LOG


def test_a_prompt_taken_up_again_starts_where_it_stands(tmp_path: Path) -> None:
    model = zoo.build("llama")
    first, _ = training.prompted(tmp_path, model, "causal", PromptTuning(4), max_steps=8)
    first.train()
    first.train()
    second, _ = training.prompted(tmp_path, model, "causal", PromptTuning(4), max_steps=8)
    second.train()
    distances = [training.logs(trainer)[0]["soft_prompt/distance"] for trainer in (first, second)]
    assert distances[1] < distances[0], "the first went on from its own start, the second from the prompt that it found"


def test_an_adapter_shows_how_far_its_gates_are_open(tmp_path: Path) -> None:
    reporter = Reporter()
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", LlamaAdapter(3), reporter)
    trainer.train()
    prompt = callback.soft_prompt
    assert prompt is not None
    gates = torch.tanh(
        torch.cat([q.detach().flatten() for name, q in prompt.encoder.named_parameters() if "gates" in name])
    )
    shown = [log for log in reporter.logs if "loss" in log][-1]
    assert shown["soft_prompt/gate"] == pytest.approx(float(gates.abs().mean()), rel=1e-5)
    assert shown["soft_prompt/gate_max"] == pytest.approx(float(gates.abs().max()), rel=1e-5)
    assert shown["soft_prompt/gate_max"] > 0
