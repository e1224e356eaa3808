"""Every method in an unmodified Trainer: resuming, best models, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
import transformers as tf
import zoo
from table import LEARNERS, Entry
from untouched import remove_all

import softhooks
from softhooks import SoftPromptCallback
from softhooks.saving.live_state import live_tensors

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
EVERY = pytest.mark.parametrize("entry", LEARNERS, ids=str)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def live(callback: SoftPromptCallback) -> dict[str, torch.Tensor]:
    """Everything that training changes, including counters in an encoder's buffers."""
    assert callback.soft_prompt is not None
    return {name: value.clone() for name, value in live_tensors(callback.soft_prompt).items()}


def state(trainer: tf.Trainer, callback: SoftPromptCallback) -> tuple[Any, Any, list[dict[str, Any]]]:
    assert trainer.optimizer is not None
    return live(callback), trainer.optimizer.state_dict(), training.logs(trainer)


@EVERY
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path, entry: Entry) -> None:
    options = {**SAVING, "save_steps": 3, "max_steps": 6, "warmup_steps": 2}
    whole, callback = training.learning(tmp_path, entry, **options)
    base, start = training.base_of(whole.model), training.trained(callback)  # type: ignore[arg-type]
    whole.train()
    expected = state(whole, callback)
    assert not [name for name in start if torch.equal(expected[0][name], start[name])], "something has not moved"

    resumed, other = training.learning(tmp_path, entry, **options)
    training.spoil(other)
    with training.logged() as messages:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [message for message in messages if "keys" in message]
    assert training.equal(state(resumed, other), expected)
    assert len(expected[2]) == 6
    assert training.equal(training.base_of(resumed.model), base)  # type: ignore[arg-type]
    assert other.report is not None


@EVERY
def test_the_best_model_is_restored(tmp_path: Path, entry: Entry) -> None:
    kept: dict[int, Any] = {}
    values = iter([1.0, 2.0, 5.0, 3.0])

    class Keeper(tf.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = live(callback)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 1}
    trainer, callback = training.learning(
        tmp_path,
        entry,
        Keeper(),
        given={"compute_metrics": lambda prediction: {"score": next(values)}},
        **SAVING,
        **best,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert training.equal(live(callback), kept[3])
    assert not training.equal(kept[3], kept[4])


@EVERY
def test_evaluations_and_predictions_are_the_models_own_answers(tmp_path: Path, entry: Entry) -> None:
    arch, head = training.task_of(entry)
    trainer, callback = training.learning(tmp_path, entry)
    model: Any = trainer.model
    trainer.train()
    data = training.rows(head, 4, entry=entry)
    trained = live(callback)
    measured = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    found = trainer.predict(data)  # type: ignore[arg-type]
    assert measured[0] == measured[1] == pytest.approx(found.metrics["test_loss"], rel=1e-6)  # type: ignore[index]
    assert training.equal(live(callback), trained)
    with softhooks.disabled(model):
        bare = trainer.predict(training.rows(head, 4))  # type: ignore[arg-type]
    one, other = logits_of(found), logits_of(bare)
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 1e-3

    trainer.save_model(str(tmp_path / "saved"))
    fresh = zoo.build(arch, head)
    softhooks.load(fresh, tmp_path / "saved")
    alone = training.make(tmp_path / "alone", fresh, head, [], given={"eval_dataset": data}).predict(data)  # type: ignore[arg-type]
    np.testing.assert_allclose(logits_of(alone), one, rtol=1e-4, atol=1e-5)
    for row, expected in zip(data, one, strict=True):
        call = {name: value[None] for name, value in row.items()}
        with torch.no_grad():
            np.testing.assert_allclose(fresh(**call).logits[0].numpy(), expected, rtol=1e-3, atol=2e-4)


def logits_of(found: Any) -> np.ndarray[Any, Any]:
    """The logits of a prediction; a sequence-to-sequence model returns more."""
    return found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
