"""Models and callbacks that are added late work and resume like those added in time, or are refused before a step."""

from __future__ import annotations

import gc
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from table import TRAINED, Entry
from trainings import METHODS, SAVING, Keeper, keep
from transformers.trainer_callback import CallbackHandler
from untouched import differences, remove_all, snapshot

import softhooks
from softhooks import AttachError, PromptTuning, SoftPromptCallback, TrainerError

BARE = CallbackHandler.add_callback
EVENLY: dict[str, Any] = {**SAVING, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()
    gc.collect()
    assert CallbackHandler.add_callback is BARE, "the handler's method must be its own again"


class OwnOptimizer(tf.Trainer):
    """A script's Trainer, whose optimizer holds the whole model."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-2, weight_decay=0.1)  # type: ignore[union-attr]
        return self.optimizer


def of_model_init(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    return training.make(folder, None, head, [callback], given={"model_init": build}, **EVENLY)


def same_of_model_init(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    model = build()
    return training.make(folder, None, head, [callback], given={"model_init": lambda trial: model}, **EVENLY)


def added(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    trainer = training.make(folder, build(), head, [], **EVENLY)
    trainer.add_callback(callback)
    return trainer


def added_to_model_init(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    trainer = training.make(folder, None, head, [], given={"model_init": build}, **EVENLY)
    trainer.add_callback(callback)
    return trainer


def added_beside_an_optimizer(
    folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback
) -> tf.Trainer:
    model = build()
    given = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=2e-2), None)}
    trainer = training.make(folder, model, head, [], given=given, **EVENLY)
    trainer.add_callback(callback)
    return trainer


def added_behind_its_optimizer(
    folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback
) -> tf.Trainer:
    trainer = training.make(folder, build(), head, [], **EVENLY)
    trainer.create_optimizer()
    trainer.add_callback(callback)
    return trainer


def with_its_own(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    return training.make(folder, build(), head, [callback], cls=OwnOptimizer, **EVENLY)


def moved(folder: Path, build: Callable[[], Any], head: str, callback: SoftPromptCallback) -> tf.Trainer:
    """The callback was used in another Trainer before."""
    before = training.make(folder / "before", build(), head, [callback])
    return added(folder, build, head, before.pop_callback(SoftPromptCallback))  # type: ignore[arg-type]


WAYS = [
    of_model_init, same_of_model_init, added, added_to_model_init, added_beside_an_optimizer, added_behind_its_optimizer,
    with_its_own, moved,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_late_is_resumed_as_if_it_had_never_been_interrupted(
    tmp_path: Path, entry: Entry, way: Callable[..., tf.Trainer]
) -> None:
    arch, head = training.task_of(entry)

    def build() -> Any:
        return zoo.build(arch, head)

    base, keeper = training.base_of(build()), Keeper()
    callback = SoftPromptCallback(entry.make(4))
    whole = way(tmp_path, build, head, callback)
    whole.add_callback(keeper)
    whole.train()
    assert training.equal(training.base_of(whole.model), base)  # type: ignore[arg-type]
    assert callback.report is not None
    assert callback.soft_prompt is not None
    held = [p for group in whole.optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
    assert sorted(map(id, held)) == sorted(map(id, callback.soft_prompt.parameters()))

    other = SoftPromptCallback(entry.make(4))
    resumed = way(tmp_path, build, head, other)
    training.spoil(other)
    with training.logged() as messages:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [message for message in messages if "keys" in message]
    assert len(training.losses(resumed)) == 4
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(keep(resumed.model, resumed.optimizer), keeper.kept[4])  # type: ignore[arg-type]
    assert not training.equal(keeper.kept[2][0], keeper.kept[4][0])

    fresh = build()
    softhooks.load(fresh, tmp_path / "checkpoint-4")
    batch = tf.default_data_collator(training.rows(head))
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, whole.model.eval()(**batch).logits)  # type: ignore[union-attr]


def test_a_callback_added_later_is_one_that_was_passed(tmp_path: Path) -> None:
    """The same groups (what decays and what does not), the same losses, the same bits."""
    method = METHODS["p-tuning-v2"]
    first, expected = training.prompted(tmp_path / "a", zoo.build("bert", "sequence"), "sequence", method, **EVENLY)
    callback = SoftPromptCallback(method)
    second = added(tmp_path / "b", lambda: zoo.build("bert", "sequence"), "sequence", callback)
    for trainer, one in ((first, expected), (second, callback)):
        assert one.soft_prompt is not None
        with torch.no_grad():
            for number, parameter in enumerate(one.soft_prompt.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
        tf.set_seed(1)
        trainer.train()
    assert [len(group["params"]) for group in first.optimizer.param_groups] == [
        len(group["params"]) for group in second.optimizer.param_groups
    ]
    assert training.losses(first) == training.losses(second)
    assert training.equal(training.trained(callback), training.trained(expected))


def test_the_best_model_of_model_init_is_restored(tmp_path: Path) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0])
    keeper, callback = Keeper(), SoftPromptCallback(METHODS["prompt"])
    trainer = training.make(
        tmp_path, None, "causal", [callback, keeper], load_best_model_at_end=True, metric_for_best_model="score",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        given={"model_init": lambda: zoo.build("llama"), "compute_metrics": lambda prediction: {"score": next(scores)}},
    )  # fmt: skip
    trainer.train()
    assert training.equal(training.trained(callback), keeper.kept[2][0])
    assert not training.equal(keeper.kept[2][0], keeper.kept[4][0])


def test_every_training_of_model_init_begins_anew(tmp_path: Path) -> None:
    """Also where `model_init` gives the same model again."""
    callback = SoftPromptCallback(METHODS["prefix-mlp"])
    trainer = same_of_model_init(tmp_path, lambda: zoo.build("llama"), "causal", callback)
    trainer.train()
    losses, found = training.losses(trainer), training.trained(callback)
    trainer.train()
    assert training.losses(trainer) == losses
    assert training.equal(training.trained(callback), found)


# --- nothing stays behind ---------------------------------------------------------------------------------------------


def test_the_handler_is_wrapped_only_while_there_is_a_callback(tmp_path: Path) -> None:
    assert CallbackHandler.add_callback is BARE
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"])
    other = SoftPromptCallback(METHODS["prompt"])
    assert CallbackHandler.add_callback is not BARE
    del trainer, callback
    gc.collect()
    assert CallbackHandler.add_callback is not BARE, "the other one is there"
    del other
    assert CallbackHandler.add_callback is BARE


def test_what_others_put_around_the_handler_stays() -> None:
    callback = SoftPromptCallback(METHODS["prompt"])
    with unittest.mock.patch.object(CallbackHandler, "add_callback", autospec=True) as theirs:
        del callback
        gc.collect()
        assert CallbackHandler.add_callback is theirs
    assert CallbackHandler.add_callback is not BARE
    SoftPromptCallback(METHODS["prompt"])
    assert CallbackHandler.add_callback is BARE, "the next one that goes takes ours away"


@dataclass
class Unhashable(tf.TrainerCallback):
    """A script's callback as a dataclass, which has no hash."""

    steps: int = 0

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.steps += 1


def test_other_callbacks_may_be_unhashable(tmp_path: Path) -> None:
    passed, late = Unhashable(), Unhashable()
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], passed)
    trainer.add_callback(late)
    trainer.train()
    assert passed.steps == late.steps == trainer.state.global_step
    assert callback.soft_prompt is not None


def test_a_callback_that_was_taken_away_attaches_no_more(tmp_path: Path) -> None:
    callback = SoftPromptCallback(METHODS["prompt"])
    trainer = of_model_init(tmp_path, lambda: zoo.build("llama"), "causal", callback)
    trainer.remove_callback(callback)
    trainer.train()
    assert not hasattr(trainer.model, "soft_prompt")
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)  # type: ignore[union-attr]
    assert held == len(list(zoo.build("llama").parameters()))


@pytest.mark.parametrize("late", [False, True], ids=["given", "added"])
def test_a_prompt_does_not_train_without_its_callback(tmp_path: Path, late: bool) -> None:
    """Nothing would check gradients, checkpoints and the base."""
    model, callback = zoo.build("llama"), SoftPromptCallback(METHODS["prompt"])
    trainer = training.make(tmp_path, model, "causal", [] if late else [callback])
    if late:
        trainer.add_callback(callback)
    trainer.remove_callback(callback)
    with pytest.raises(TrainerError, match="add the callback again"):
        trainer.train()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report is not None


def test_a_prompt_that_went_with_its_callback_leaves_the_model_to_train(tmp_path: Path) -> None:
    model, callback = zoo.build("llama"), SoftPromptCallback(METHODS["prompt"])
    trainer = training.make(tmp_path, model, "causal", [callback])
    trainer.remove_callback(callback)
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    before = training.base_of(model)
    trainer.train()
    assert not training.equal(training.base_of(model), before)


def test_an_added_callback_that_fails_is_not_there(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [])
    before, callbacks = snapshot(model), list(trainer.callback_handler.callbacks)
    with pytest.raises(AttachError):
        trainer.add_callback(SoftPromptCallback(METHODS["prompt"], trainable="*nothing*"))
    assert trainer.callback_handler.callbacks == callbacks
    assert not differences(before, snapshot(model))
    trainer.train()


# --- refused ----------------------------------------------------------------------------------------------------------


class Smuggler(tf.TrainerCallback):
    """A callback that adds the SoftPromptCallback too late."""

    def __init__(self, event: str, add: Callable[[SoftPromptCallback], None]) -> None:
        self.add = add
        setattr(self, event, lambda *args, **kwargs: self.add(SoftPromptCallback(METHODS["prompt"])))


def test_a_callback_that_is_added_while_training_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [])
    trainer.add_callback(Smuggler("on_step_begin", lambda callback: trainer.add_callback(callback)))
    base = training.base_of(model)
    with pytest.raises(TrainerError, match=r"added at step 0; it must be added before(.|\n)*before `train\(\)`"):
        trainer.train()
    assert training.equal(training.base_of(model), base)
    assert not any(isinstance(one, SoftPromptCallback) for one in trainer.callback_handler.callbacks)


def test_a_callback_that_is_smuggled_in_takes_no_step(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [])
    trainer.add_callback(
        Smuggler("on_step_begin", lambda callback: trainer.callback_handler.callbacks.append(callback))
    )
    base = training.base_of(model)
    with pytest.raises(TrainerError, match=r"is not attached at step 1(.|\n)*remove the prompt after"):
        trainer.train()
    assert training.equal(training.base_of(model), base)


def smuggled(folder: Path, model: Any, **options: Any) -> tf.Trainer:
    """A Trainer whose callback was put into the handler's list without an event."""
    trainer = training.make(folder, model, "causal", [], **options)
    trainer.callback_handler.callbacks.append(SoftPromptCallback(METHODS["prompt"]))
    return trainer


def test_what_could_not_be_resumed_is_not_saved(tmp_path: Path) -> None:
    for strategy in ("steps", "epoch"):
        model = zoo.build("llama")
        before = snapshot(model)
        trainer = smuggled(tmp_path, model, save_strategy=strategy, save_steps=2)
        with pytest.raises(TrainerError, match=rf"save_strategy='{strategy}'(.|\n)*`callbacks=\[SoftPromptCallback"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not [name for name in differences(before, snapshot(model)) if name.startswith("tensor")]
        assert not list(tmp_path.glob("checkpoint-*"))
    trainer = smuggled(tmp_path, zoo.build("llama"))
    base = training.base_of(trainer.model)  # type: ignore[arg-type]
    trainer.train()
    assert training.equal(training.base_of(trainer.model), base)  # type: ignore[arg-type]
    assert len(training.losses(trainer)) == 4


def test_a_model_that_was_swapped_in_is_not_saved_either(tmp_path: Path) -> None:
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], **SAVING)
    trainer.model = trainer.model_wrapped = zoo.build("llama", seed=5)
    with pytest.raises(TrainerError, match="save_strategy='steps'"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_prompt_that_was_resumed_too_late_is_refused(tmp_path: Path) -> None:
    first, _ = training.prompted(
        tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], save_only_model=True, **SAVING
    )
    first.train()
    model = zoo.build("llama")
    before = snapshot(model)
    trainer = smuggled(tmp_path, model)
    with training.logged(), pytest.raises(TrainerError, match="training is resumed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [name for name in differences(before, snapshot(model)) if name.startswith("tensor")]


def test_an_added_callback_resumes_only_what_it_wrote(tmp_path: Path) -> None:
    callback = SoftPromptCallback(PromptTuning(4))
    added(tmp_path, lambda: zoo.build("llama"), "causal", callback).train()
    for method, words in ((PromptTuning(5), "num_virtual_tokens"), (METHODS["prefix"], "prefix_tuning")):
        again = added(tmp_path, lambda: zoo.build("llama"), "causal", SoftPromptCallback(method))
        with pytest.raises(TrainerError, match=words):
            again.train(resume_from_checkpoint=True)
        assert not training.losses(again)[4:]
