"""`hyperparameter_search`: every trial trains a new prompt on its own model, and no model is left behind."""

from __future__ import annotations

import gc
import importlib.machinery
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import training
import transformers as tf
import zoo
from table import BY_NAME, TRAINED, Entry
from untouched import remove_all

import softhooks
from softhooks import SoftPromptCallback, TrainerError

RATES = [0.02, 0.5, 0.1]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Trial:
    """The interface of Optuna's trials that the Trainer uses."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.params: dict[str, Any] = {"learning_rate": RATES[number]}

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        return float(self.params[name])

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        self.params[name] = choices[self.number % len(choices)]
        return str(self.params[name])


class Study:
    """The interface of Optuna's studies that the Trainer uses: run trials, and name the best."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def optimize(self, objective: Callable[[Trial], float], n_trials: int, **kwargs: Any) -> None:
        self.values = [objective(Trial(number)) for number in range(n_trials)]

    def _is_multi_objective(self) -> bool:
        return False

    @property
    def best_trial(self) -> Any:
        number = self.values.index(min(self.values))
        return types.SimpleNamespace(number=number, value=self.values[number], params=Trial(number).params)


@pytest.fixture(params=["stand-in", "optuna"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Optuna, where it is installed, and a stand-in everywhere."""
    if request.param == "optuna":
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return {"sampler": optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0)}
    module = types.ModuleType("optuna")
    module.__spec__ = importlib.machinery.ModuleSpec("optuna", None)
    trials = types.SimpleNamespace(BaseTrial=Trial)
    module.__dict__.update(Trial=Trial, trial=trials, create_study=lambda **kwargs: Study())
    monkeypatch.setitem(sys.modules, "optuna", module)
    monkeypatch.setattr("transformers.hyperparameter_search.OptunaBackend.is_available", staticmethod(lambda: True))
    return {}


def space(trial: Any) -> dict[str, float]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1.0, log=True)}


class Model:
    """A `model_init` that records the models it has made."""

    def __init__(self, entry: Entry, attached: bool, task: tuple[str, str] | None = None, p: int = 4) -> None:
        self.entry = entry
        self.attached = attached
        self.task = task or training.task_of(entry)
        self.p = p
        self.made: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def __call__(self) -> Any:
        gc.collect()
        self.alive.append(sum(model() is not None for model in self.made))
        model = zoo.build(*self.task)
        if self.attached:
            softhooks.attach(model, self.entry.make(self.p))
        self.made.append(weakref.ref(model))
        return model


@pytest.mark.parametrize("attached", [False, True], ids=["by the callback", "inside model_init"])
@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_each_trial_trains_its_prompt_only(
    tmp_path: Path, entry: Entry, attached: bool, backend: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, head = training.task_of(entry)
    base = training.base_of(zoo.build(arch, head))
    build = Model(entry, attached)
    held: list[int] = []

    class Look(tf.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert training.equal(training.base_of(kwargs["model"]), base)
            held.append(sum(p.numel() for group in kwargs["optimizer"].param_groups for p in group["params"]))

    callback = SoftPromptCallback(entry.make(4))
    trainer = training.make(
        tmp_path, None, head, [callback, Look()], given={"model_init": build}, save_strategy="steps", save_steps=2
    )
    assert callback.soft_prompt is not None
    numbers = callback.soft_prompt.num_parameters
    best: Any = trainer.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna", **backend)
    assert held == [numbers] * 3
    assert callback.report is not None
    assert callback.soft_prompt is None
    assert max(build.alive) <= 1, "the model of a trial that is over must go"
    folders = sorted(tmp_path.glob("run-*/checkpoint-4"))
    assert [folder.parent.name for folder in folders] == ["run-0", "run-1", "run-2"]

    # the best one, trained by itself, is what the search says it was
    model = zoo.build(arch, head)
    softhooks.load(model, folders[int(best.run_id)])
    alone = training.make(tmp_path / "alone", model, head, [])
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-5)


@pytest.mark.parametrize("entry", TRAINED, ids=str)
@pytest.mark.parametrize("attached", [False, True], ids=["by the callback", "inside model_init"])
def test_a_model_of_model_init_resumes_from_its_own_only(tmp_path: Path, entry: Entry, attached: bool) -> None:
    head = training.task_of(entry)[1]

    def make(inside: Entry = entry, p: int = 4, **more: Any) -> tuple[tf.Trainer, SoftPromptCallback]:
        build = Model(inside, attached=attached, task=training.task_of(entry), p=p)
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "given": {"model_init": build}, **more}
        return training.prompted(tmp_path, None, head, inside.make(p), **options)

    with training.logged() as messages:
        whole, callback = make()
        whole.train()
    assert not messages
    again, other = make()
    with training.logged():
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(other), training.trained(callback))
    assert training.losses(again) == training.losses(whole)
    # torch or the Trainer may find the other shapes first; in any case no step is taken
    for wrong in ({"optim": "adafactor"}, {"p": 5}, {"inside": BY_NAME["prefix-random"]}):
        wronged, _ = make(**wrong)  # type: ignore[arg-type]
        with (
            training.logged(),
            pytest.raises(
                (TrainerError, ValueError, RuntimeError),
                match=r"this run and the checkpoint differ in the|match|Error\(s\)",
            ),
        ):
            wronged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert not training.losses(wronged)[2:]


# --- what a trial may be ----------------------------------------------------------------------------------------------


def search(folder: Path, build: Any, chosen: Any, backend: dict[str, Any], **options: Any) -> tuple[Any, tf.Trainer]:
    """Search with a callback on Llama models; the best run, and the Trainer."""
    callback = SoftPromptCallback(BY_NAME["prompt"].make(4))
    trainer = training.make(folder, None, "causal", [callback], given={"model_init": build}, **options)
    best = trainer.hyperparameter_search(chosen, n_trials=2, direction="minimize", backend="optuna", **backend)
    return best, trainer


@pytest.fixture
def sampling(backend: dict[str, Any]) -> dict[str, Any]:
    """Without a grid over learning rates."""
    return {}


def test_one_model_for_all_trials_gets_a_new_prompt_for_each(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """With the same seed and rate, the second trial repeats the first bit for bit."""
    model = zoo.build("llama")
    base = training.base_of(model)
    losses: list[list[float]] = []

    class Look(tf.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.append([entry["loss"] for entry in state.log_history if "loss" in entry])
            assert list(model.soft_prompt) == ["default"]

    callback = SoftPromptCallback(BY_NAME["prefix-mlp"].make(4))
    trainer = training.make(tmp_path, None, "causal", [callback, Look()], given={"model_init": lambda: model})
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": 0.1}, n_trials=3, direction="minimize", backend="optuna", **sampling
    )
    assert len(losses[0]) == 4
    assert losses == [losses[0]] * 3
    assert training.equal(training.base_of(model), base)


def test_a_prompt_of_the_scripts_own_is_no_start_for_two_trials(tmp_path: Path, sampling: dict[str, Any]) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, BY_NAME["prompt"].make(4))
    with pytest.raises(TrainerError, match="a prompt that another trial has trained"):
        search(tmp_path, lambda: model, space, sampling)


def test_a_trial_may_choose_its_optimizer(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """The checkpoint names the one that was chosen, and resumes with it only."""

    def optim(trial: Any) -> dict[str, str]:
        return {"optim": trial.suggest_categorical("optim", ["adafactor"])}

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    search(tmp_path, lambda: zoo.build("llama"), optim, sampling, **options)
    for name in ("adafactor", "adamw_torch"):
        again = training.make(
            tmp_path, None, "causal", [SoftPromptCallback(BY_NAME["prompt"].make(4))],
            given={"model_init": lambda: zoo.build("llama")}, optim=name, **options,
        )  # fmt: skip
        if name == "adafactor":
            again.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-2"))
            assert len(training.losses(again)) == 4
        else:
            with pytest.raises(TrainerError, match=r"adafactor(.|\n)*adamw_torch"):
                again.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-2"))


def test_a_trial_with_a_fused_optimizer_takes_no_step(tmp_path: Path, sampling: dict[str, Any]) -> None:
    class Chosen(tf.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.optim = "adalomo"  # as a trial would, where that optimizer is installed

    model = zoo.build("llama")
    base = training.base_of(model)
    callbacks = [Chosen(), SoftPromptCallback(BY_NAME["prompt"].make(4))]
    trainer = training.make(tmp_path, None, "causal", callbacks, given={"model_init": lambda: model})
    with pytest.raises(TrainerError, match="steps inside the backward"):
        trainer.hyperparameter_search(space, n_trials=1, direction="minimize", backend="optuna", **sampling)
    assert trainer.state.global_step == 0
    assert training.equal(training.base_of(model), base)


def test_a_pruned_trial_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    build = Model(BY_NAME["prompt"], attached=False, task=("llama", "causal"))
    base = training.base_of(zoo.build("llama"))
    callback = SoftPromptCallback(BY_NAME["prompt"].make(4))
    trainer = training.make(
        tmp_path, None, "causal", [callback], given={"model_init": build}, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    best: Any = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": [0.5, 1e-6, 0.5][trial.number]}, n_trials=3, direction="minimize",
        backend="optuna", pruner=optuna.pruners.MedianPruner(n_startup_trials=1),
        sampler=optuna.samplers.RandomSampler(seed=0), study_name="pruned",
        storage=optuna.storages.InMemoryStorage(), catch=(),
    )  # fmt: skip
    finished = sorted(path.parent.name for path in tmp_path.glob("run-*/checkpoint-4"))
    assert finished == ["run-0", "run-2"], "the second was pruned"
    assert max(build.alive) <= 1
    assert callback.soft_prompt is None
    model = zoo.build("llama")
    softhooks.load(model, tmp_path / f"run-{best.run_id}" / "checkpoint-4")
    assert training.equal(training.base_of(model), base)
    assert training.make(tmp_path / "alone", model, "causal", []).evaluate()["eval_loss"] == pytest.approx(
        best.objective
    )
