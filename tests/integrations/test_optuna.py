"""Optuna: searches over methods with a Trainer and in a study of your own; the best prompt is found again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import examples
import optuna
import torch
import training
import transformers as tf
import zoo
from untouched import differences, remove_all, snapshot

import softhooks
from softhooks import (
    CheckpointError,
    FrozenModifiedError,
    LlamaAdapter,
    OptionError,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SoftHooksError,
    SoftPromptCallback,
    TrainerError,
)
from softhooks.integrations.optuna import Candidate, PromptSpace, checkpoint_of

RATES = (1e-3, 1e-1)
SAVING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    remove_all()


def space() -> PromptSpace:
    return PromptSpace(
        prompt=Candidate(PromptTuning, num_virtual_tokens=[2, 5], learning_rate=RATES, init=["vocab", "random"]),
        prefix=Candidate(
            PrefixTuning, num_virtual_tokens=range(2, 7, 2), learning_rate=(1e-4, 1e-2), projection=[False]
        ),
        adapter=Candidate(LlamaAdapter, num_virtual_tokens=[3], learning_rate=RATES),
        mlp=Candidate(
            functools.partial(PTuning, encoder="mlp"), num_virtual_tokens=[3], learning_rate=RATES, hidden_size=[8]
        ),
    )


def sampled(count: int = 100) -> list[Any]:
    """Untrained trials of every kind."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask() for _ in range(count)]


# --- the space --------------------------------------------------------------------------------------------------------


def test_a_trial_chooses_a_method_and_what_it_has() -> None:
    tried = space()
    seen: set[tuple[Any, ...]] = set()
    for trial in sampled():
        method, rate = chosen = tried.suggest(trial)
        assert tried.suggest(trial) == chosen, "asked again, the same"
        assert tried(trial) == {"learning_rate": rate}
        assert tried.chosen(trial) == tried.chosen(trial.params) == chosen
        low, high = (1e-4, 1e-2) if isinstance(method, PrefixTuning) else RATES
        assert low <= rate <= high
        seen.add((type(method), method.num_virtual_tokens, getattr(method, "init", None)))
        if isinstance(method, PTuning):
            assert (method.encoder, method.hidden_size) == ("mlp", 8)
    wanted = {(PromptTuning, length, init) for length in (2, 5) for init in ("vocab", "random")}
    wanted |= {(PrefixTuning, length, "text") for length in (2, 4, 6)}
    assert seen == wanted | {(LlamaAdapter, 3, None), (PTuning, 3, None)}
    assert all(isinstance(name, str) and "." in name for trial in sampled(1) for name in trial.params)


def test_one_candidate_is_not_chosen_from() -> None:
    tried = PromptSpace(only=Candidate(PromptTuning, num_virtual_tokens=[4], learning_rate=RATES))
    [trial] = sampled(1)
    assert tried.suggest(trial).method == PromptTuning(4)
    assert list(trial.params) == ["only.learning_rate"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_virtual_tokens": []}, "is not a list of values to choose from"),
        ({"num_virtual_tokens": 4}, "is not a list of values to choose from"),
        ({"num_virtual_tokens": [0]}, "num_virtual_tokens"),
        ({"init": ["vocab", "nonsense"]}, "nonsense"),
        ({"init": "vocab"}, "init='vocab' is not a list"),
        ({"init": [["vocab"], ["random"]]}, "a single value of another type"),
        ({"hidden": [4]}, r"PromptTuning does not accept(.|\n)*hidden"),
        ({"learning_rate": (0.1, 0.01)}, "it must be a pair"),
        ({"learning_rate": (0.0, 0.01)}, "it must be a pair"),
    ],
    ids=str,
)
def test_a_candidate_that_cannot_be_is_refused_before_a_trial(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Candidate(PromptTuning, **{"num_virtual_tokens": [4], "learning_rate": RATES, **options})


def test_what_is_of_another_space_is_refused() -> None:
    with pytest.raises(OptionError, match="has no candidates"):
        PromptSpace()
    for foreign in ({"learning_rate": 0.1}, {"method": "nothing"}, {"method": "prompt", "prompt.init": "zero"}):
        with pytest.raises(OptionError, match=r"do not fit this PromptSpace(.|\n)*prompt, prefix"):
            space().chosen(foreign)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[optuna\]"'):
        space().chosen({})


# --- with a Trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["a model a trial", "one model"])
def test_a_trainer_searches_and_the_best_comes_back(tmp_path: Path, shared: bool) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    tried, seen = space(), []

    class Look(tf.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found = kwargs["model"]
            assert training.equal(training.base_of(found), base)
            assert list(found.soft_prompt) == ["default"]
            [method] = [prompt.method for prompt in found.soft_prompt.prompted_model.prompts.values()]
            if state.is_hyper_param_search:
                assert tried.chosen(state.trial_params) == (method, args.learning_rate)
                seen.append(type(method))

    trainer = training.make(
        tmp_path, None, "causal", [tried.callback(), Look()],
        given={"model_init": (lambda: model) if shared else lambda: zoo.build("llama")}, **SAVING,
    )  # fmt: skip
    best: Any = trainer.hyperparameter_search(
        tried, backend="optuna", direction="minimize", n_trials=5, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    assert len(seen) == 5
    assert len(set(seen)) == 4, "every method was tried"
    method, rate = tried.chosen(best)

    fresh = zoo.build("llama")
    prompt = softhooks.load(fresh, checkpoint_of(best, trainer.args))
    assert prompt.method.kind == method.kind
    alone = training.make(tmp_path / "alone", fresh, "causal", [])
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-5)
    prompt.remove()

    assert tried.settle(best, trainer) == (method, rate)
    assert trainer.args.learning_rate == rate
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6), "trained again, it is the same"


def test_a_pruner_ends_trials_early(tmp_path: Path) -> None:
    tried = PromptSpace(only=Candidate(PromptTuning, num_virtual_tokens=[3, 4], learning_rate=(1e-6, 0.5)))
    sampler = optuna.samplers.GridSampler(
        {"only.num_virtual_tokens": [4], "only.learning_rate": [0.5, 1e-6, 0.4]}, seed=5
    )
    storage = optuna.storages.InMemoryStorage()
    given = {"model_init": lambda: zoo.build("llama")}
    trainer = training.make(tmp_path, None, "causal", [tried.callback()], given=given, **SAVING)
    tried.settle({"only.num_virtual_tokens": 4, "only.learning_rate": 1e-6}, trainer)
    trainer.train()
    start = trainer.evaluate()["eval_loss"]
    trainer.hyperparameter_search(
        tried, backend="optuna", direction="minimize", n_trials=3, sampler=sampler, storage=storage, study_name="pruned",
        pruner=optuna.pruners.ThresholdPruner(upper=start - 0.01, n_warmup_steps=3),
    )  # fmt: skip
    trials = optuna.load_study(study_name="pruned", storage=storage).trials
    states = {trial.params["only.learning_rate"]: trial.state.name for trial in trials}
    assert states == {0.5: "COMPLETE", 0.4: "COMPLETE", 1e-6: "PRUNED"}
    [pruned] = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert list(pruned.intermediate_values) == [1, 2, 3]


def test_threads_that_would_share_a_trainer_are_refused(tmp_path: Path) -> None:
    tried = space()
    callback: Any = tried.callback()
    one, other = sampled(2)
    assert callback.method_for(one) == tried.suggest(one).method
    callback._thread = -1  # another one's
    with pytest.raises(TrainerError, match="n_jobs=1"):
        callback.method_for(other)
    assert callback.method_for(None) == PromptTuning(2)


def test_what_a_trainer_cannot_give_back(tmp_path: Path) -> None:
    tried = space()
    best = tf.trainer_utils.BestRun("7", 1.0, {"method": "adapter", "adapter.learning_rate": 0.01})
    trainer = training.make(tmp_path, zoo.build("llama"), "causal", [SoftPromptCallback(PromptTuning(4))])
    with pytest.raises(CheckpointError, match=r"run-7(.|\n)*space\.settle"):
        checkpoint_of(best, trainer.args)
    for other in (tried, space()):
        with pytest.raises(TrainerError, match=r"space\.callback\(\)(.|\n)*") as error:
            other.settle(best, trainer)
        assert "SoftPromptCallback" in str(error.value)


# --- in a study of one's own ------------------------------------------------------------------------------------------


def loop(prompt: Any, rate: float, report: Any, steps: int = 3) -> float:
    """A plain loop."""
    batch = tf.default_data_collator(training.rows("causal"))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=rate)
    value = 0.0
    for step in range(steps):
        loss = prompt.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        report(value, step)
    return value


def test_a_study_finds_and_keeps_the_best(tmp_path: Path) -> None:
    model = zoo.build("llama")
    before = snapshot(model)
    tried = space()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    study.optimize(tried.objective(model, loop, save_to=tmp_path), n_trials=6)
    assert not differences(before, snapshot(model))
    assert [len(trial.intermediate_values) for trial in study.trials] == [3] * 6
    chosen = tried.chosen(study.best_trial)
    with softhooks.load(model, tmp_path / f"trial-{study.best_trial.number}") as prompt:
        assert prompt.method.kind == chosen.method.kind
        with torch.no_grad():
            loss = model(**tf.default_data_collator(training.rows("causal"))).loss
    assert float(loss) < study.best_value, "one step more than the last value that was reported"


def test_a_trial_that_is_pruned_or_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = zoo.build("llama")
    before = snapshot(model)
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.0))
    study.optimize(space().objective(model, loop, save_to=tmp_path), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED"] * 2
    assert [list(trial.intermediate_values) for trial in study.trials] == [[0]] * 2
    assert not differences(before, snapshot(model))
    assert not list(tmp_path.iterdir())

    def fails(prompt: Any, rate: float, report: Any) -> float:
        raise ArithmeticError("of the script's own")

    with pytest.raises(ArithmeticError):
        study.optimize(space().objective(model, fails), n_trials=1)
    assert not differences(before, snapshot(model))
    objective = space().objective(model, loop)
    study.optimize(objective, n_trials=1)


def test_a_base_that_moves_and_threads_are_refused() -> None:
    model = zoo.build("llama")

    def moves(prompt: Any, rate: float, report: Any) -> float:
        with torch.no_grad():
            prompt.model.lm_head.weight[0, 0] += 1
        return 0.0

    study = optuna.create_study()
    with pytest.raises(FrozenModifiedError, match="lm_head"):
        study.optimize(space().objective(model, moves), n_trials=1)
    nested: list[Any] = []

    def inside(prompt: Any, rate: float, report: Any) -> float:
        with pytest.raises(TrainerError, match="n_jobs=1"):
            objective(sampled(1)[0])
        nested.append(prompt)
        return 0.0

    objective = space().objective(zoo.build("llama"), inside)
    study.optimize(objective, n_trials=1)
    assert len(nested) == 1


def test_the_example_runs() -> None:
    names = examples.run("optuna")
    assert names["prompt"].name == "best"
    assert names["prompt"].method.kind == names["space"].chosen(names["best"]).method.kind
    assert training.equal(training.base_of(names["model"]), training.base_of(zoo.build("llama")))
