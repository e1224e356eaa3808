"""skorch: nets over a model with a prompt; searches, clones, pickles, and skorch's own checkpoints."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("skorch")

import examples
import numpy as np
import torch
import training
import zoo
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Checkpoint, LoadInitState
from skorch.helper import SliceDict
from table import TRAINED
from torch import Tensor, nn
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    AttachError,
    FrozenModifiedError,
    MultitaskPromptTuning,
    OptionError,
    PrefixTuning,
    PromptTuning,
    SoftHooksError,
    TrainerError,
    UnsupportedMethodError,
)
from softhooks.integrations import skorch as integration
from softhooks.integrations.skorch import FrozenCheck, PromptedModule

ROOT = Path(__file__).parents[2]
LOAD = functools.partial(zoo.build, "bert", "sequence")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def data(count: int = 30) -> tuple[SliceDict, np.ndarray]:
    rows = training.rows("sequence", count)
    ids, labels = (torch.stack([row[key] for row in rows]).numpy() for key in ("input_ids", "labels"))
    return SliceDict(input_ids=ids, attention_mask=np.ones_like(ids)), labels


def net(method: softhooks.method.Method | None = None, model: Any = LOAD, **options: Any) -> NeuralNetClassifier:
    options = {
        "train_split": None,
        "max_epochs": 2,
        "batch_size": 10,
        "callbacks": [FrozenCheck],
        "lr": 1e-2,
        **options,
    }
    module = options.pop("module", PromptedModule)
    given = {"module__model": model, "module__method": method or PromptTuning(4)} if module is PromptedModule else {}
    return NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, verbose=0, **given, **options
    )


def trained(fitted: NeuralNetClassifier) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in fitted.module_.prompt.named_parameters()}


def losses(fitted: NeuralNetClassifier) -> list[float]:
    return list(fitted.history[:, "train_loss"])


# --- training ---------------------------------------------------------------------------------------------------------


def test_only_the_prompt_and_its_head_train() -> None:
    X, y = data()
    started = net().initialize()
    base, start = training.base_of(started.module_.model), trained(started)
    bare = LOAD()
    with softhooks.disabled(started.module_.model), torch.no_grad():
        ids = torch.from_numpy(X["input_ids"])
        assert torch.equal(started.module_.eval()(input_ids=ids), bare(input_ids=ids).logits)
    started.partial_fit(X, y, epochs=3)
    assert training.equal(training.base_of(started.module_.model), base)
    assert not any(torch.equal(start[name], tensor) for name, tensor in trained(started).items())
    assert all(name.startswith("soft_prompt.") for name in start)
    assert losses(started)[-1] < losses(started)[0]
    report = dict(started.callbacks_)["FrozenCheck"].reports_[0]
    assert report.bytes == sum(t.numel() * t.element_size() for t in (*bare.parameters(), *bare.buffers()))
    assert started.predict_proba(X).shape == (30, 3)
    assert len(started.optimizer_.state_dict()["state"]) == len(start)


def test_a_model_that_is_given_stays_bare_and_its_weights_are_shared() -> None:
    X, y = data()
    given = zoo.build("bert", "sequence")
    with untouched(given):
        one, two = net(model=given).fit(X, y), net(PrefixTuning(4), model=given).fit(X, y)
        for fitted in (one, two):
            own = dict(fitted.module_.model.named_parameters())
            assert all(own[name].data_ptr() == weight.data_ptr() for name, weight in given.named_parameters())
            fitted.module_.prompt.remove()
    assert all(weight.requires_grad for weight in given.parameters())


class Attaching(nn.Module):
    """A user's own module, which attaches its prompt itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LOAD()
        self.prompt = softhooks.attach(self.inner, PromptTuning(4))

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs).logits


def test_frozen_check_finds_the_prompt_of_a_module_that_attaches_its_own() -> None:
    X, y = data()
    fitted = net(module=Attaching).fit(X, y)
    assert dict(fitted.callbacks_)["FrozenCheck"].reports_[0].tensors > 0
    weight = fitted.module_.inner.bert.encoder.layer[0].output.dense.weight
    weight.data[0, 0] += 1
    with pytest.raises(FrozenModifiedError, match=r"layer\.0\.output\.dense\.weight"):
        fitted.partial_fit(X, y, epochs=1)


# --- searches, clones, pickles ----------------------------------------------------------------------------------------


def test_a_grid_search_over_methods_and_rates() -> None:
    X, y = data()
    grid = {"module__method": [PromptTuning(4), PrefixTuning(4)], "lr": [1e-6, 2e-2]}
    search = GridSearchCV(net(max_epochs=3), grid, cv=2, scoring="accuracy", error_score="raise").fit(X, y)
    assert len(search.cv_results_["mean_test_score"]) == 4
    best = search.best_estimator_
    assert best.module_.prompt.method == search.best_params_["module__method"]
    assert best.predict(X).shape == y.shape
    again = pickle.loads(pickle.dumps(search)).best_estimator_
    assert np.array_equal(again.predict_proba(X), best.predict_proba(X))


def test_set_params_and_clone_begin_anew_with_a_prompt_of_their_own() -> None:
    X, y = data()
    first = net().fit(X, y)
    other = clone(first)
    assert not hasattr(other, "module_")
    other.set_params(module__method=PrefixTuning(3), max_epochs=1).fit(X, y)
    assert other.module_.prompt.method == PrefixTuning(3)
    assert first.module_.prompt.method == PromptTuning(4)
    first.set_params(module__method=PromptTuning(5))
    assert first.module_.prompt.method == PromptTuning(5)


@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_a_copy_goes_on_by_itself_and_as_the_first_would(entry: Any) -> None:
    """A deep copy of hooks alone would train the first model's prompt, or none."""
    X, y = data()
    first = net(entry.make(4)).fit(X, y)
    state = torch.get_rng_state()
    other = copy.deepcopy(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(other.predict_proba(X), first.predict_proba(X))
    before = trained(first)
    torch.manual_seed(5)
    other.partial_fit(X, y, epochs=2)
    assert training.equal(trained(first), before)
    torch.manual_seed(5)
    first.partial_fit(X, y, epochs=2)
    assert training.equal(trained(first), trained(other))
    assert losses(first) == losses(other)


def test_a_pickled_net_answers_the_same_in_another_process(tmp_path: Path) -> None:
    X, y = data()
    fitted = net(PrefixTuning(4, projection=True, hidden_size=16), model=zoo.build("bert", "sequence")).fit(X, y)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps((fitted, X)))
    np.save(tmp_path / "expected.npy", fitted.predict_proba(X))
    code = (
        "import sys, pickle, pathlib, numpy, torch; torch.set_num_threads(1); folder = pathlib.Path(sys.argv[1])\n"
        "net, X = pickle.loads((folder / 'net.pkl').read_bytes())\n"
        "assert numpy.array_equal(net.predict_proba(X), numpy.load(folder / 'expected.npy'))\n"
        "net.partial_fit(X, numpy.arange(30) % 3, epochs=1); print('same', net.callbacks_[-2][1].reports_[0])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": f"{ROOT / 'tests' / 'support'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.startswith("same frozen: ")


class Scaled(PromptedModule):
    """A subclass with another answer, and a module beside the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Linear(3, 3)

    def answer(self, output: Any) -> Any:
        return self.scale(output.logits)


def test_a_subclass_keeps_what_it_has_beside_the_model(tmp_path: Path) -> None:
    module = Scaled(LOAD, PromptTuning(4))
    ids = {"input_ids": zoo.text(2)}
    other = copy.deepcopy(module)
    assert torch.equal(other(**ids), module(**ids))
    fresh = Scaled(LOAD, PromptTuning(4))
    with torch.no_grad():
        for parameter in (*fresh.scale.parameters(), *fresh.prompt.parameters()):
            parameter.add_(1)
    assert not torch.equal(fresh(**ids), module(**ids))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(**ids), module(**ids))
    state = module.state_dict()
    del state["scale.bias"]
    with pytest.raises(TrainerError, match=r"missing: +\['scale\.bias'\]"):
        fresh.load_state_dict(state)


# --- skorch's own files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_safetensors", [False, True])
def test_files_hold_the_prompt_only_and_bring_it_back(tmp_path: Path, use_safetensors: bool) -> None:
    X, y = data()
    first = net(PrefixTuning(4, projection=True, hidden_size=16)).fit(X, y)
    path = str(tmp_path / "params")
    first.save_params(path, use_safetensors=use_safetensors)
    held = load_file(path) if use_safetensors else torch.load(path, weights_only=True)
    assert {*held} == {f"model.{name}" for name in (*trained(first), "soft_prompt.default.description")}
    fresh = net(PrefixTuning(4, projection=True, hidden_size=16)).initialize()
    assert not np.array_equal(fresh.predict_proba(X), first.predict_proba(X))
    fresh.load_params(path, use_safetensors=use_safetensors)
    assert training.equal(trained(fresh), trained(first))
    assert np.array_equal(fresh.predict_proba(X), first.predict_proba(X))


@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_a_run_that_load_init_state_takes_up_ends_where_an_uninterrupted_one_ends(tmp_path: Path, entry: Any) -> None:
    X, y = data()

    class Seeded(NeuralNetClassifier):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_epoch_begin(*args, **kwargs)
            torch.manual_seed(len(self.history))  # dropout follows the epoch

    def make(folder: str, epochs: int) -> NeuralNetClassifier:
        kept = Checkpoint(monitor=None, dirname=str(tmp_path / folder), f_criterion=None)
        torch.manual_seed(0)
        made = net(entry.make(4), max_epochs=epochs, callbacks=[FrozenCheck, kept, LoadInitState(kept)])
        return Seeded(**made.get_params(deep=False))

    whole = make("whole", 4).fit(X, y)
    make("cut", 2).fit(X, y)
    later = make("cut", 2).fit(X, y)
    assert losses(later) == losses(whole)
    assert training.equal(trained(later), trained(whole))
    assert training.equal(later.optimizer_.state_dict(), whole.optimizer_.state_dict())
    assert (tmp_path / "cut" / "params.pt").stat().st_size < 30_000  # of 92,000 of the base


def test_a_checkpoint_with_safetensors_gives_back_the_best(tmp_path: Path) -> None:
    X, y = data()
    kept = Checkpoint(
        monitor="train_loss_best", dirname=str(tmp_path), f_optimizer=None, f_criterion=None, use_safetensors=True,
        load_best=True,
    )  # fmt: skip
    fitted = net(callbacks=[FrozenCheck, kept], max_epochs=4, lr=0.5).fit(X, y)
    held = load_file(tmp_path / "params.pt")
    assert all(torch.equal(held[f"model.{name}"], tensor) for name, tensor in trained(fitted).items())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_carries_a_prompt_is_refused_and_stays_as_it_is() -> None:
    model = zoo.build("bert", "sequence")
    softhooks.attach(model, PromptTuning(4))
    with untouched(model), pytest.raises(AttachError, match="a PromptedModule attaches its own"):
        PromptedModule(model, PromptTuning(4))


@pytest.mark.parametrize(("model", "says"), [("bert", "str"), (lambda: 3, "and returns int")])
def test_what_is_given_must_be_a_model_or_make_one(model: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        PromptedModule(model, PromptTuning(4))


def test_a_method_with_a_loss_of_its_own_is_refused_and_the_model_untouched() -> None:
    model = zoo.build("llama", "causal")
    method = MultitaskPromptTuning(4, tasks=2, teachers="train", teacher_steps=2)
    with untouched(model), pytest.raises(UnsupportedMethodError, match="criterion"):
        PromptedModule(model, method)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"method": PrefixTuning(4)}, "differ in the method"),
        ({"method": PromptTuning(5)}, "differ in the method"),
        ({"model": functools.partial(zoo.build, "roberta", "sequence")}, "differ in the base model"),
    ],
    ids=["method", "shape", "base"],
)
def test_a_file_of_another_prompt_is_refused_before_anything_is_loaded(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    net().initialize().save_params(str(tmp_path / "params"))
    fresh = net(**other).initialize()
    before = trained(fresh)
    with pytest.raises(TrainerError, match=says):
        fresh.load_params(str(tmp_path / "params"))
    assert training.equal(trained(fresh), before)


def test_frozen_check_refuses_a_net_without_a_prompt_and_a_loss_that_does_not_reach_it() -> None:
    X, y = data()
    with pytest.raises(TrainerError, match="found no prompt on the net's modules"):
        net(module=Bare).fit(X, y)
    with pytest.raises(TrainerError, match="no gradient reached the prompt"):
        net(module=Elsewhere).fit(X, y)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LOAD()

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs).logits


class Elsewhere(Attaching):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(3))

    def forward(self, **inputs: Tensor) -> Any:
        return super().forward(**inputs).detach() + self.own


def test_without_skorch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(integration), "FrozenCheck")
    monkeypatch.setitem(sys.modules, "skorch.callbacks", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[skorch\]"'):
        _ = integration.FrozenCheck
    monkeypatch.undo()
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = integration.Missing


def test_the_example_runs() -> None:
    names = examples.run("skorch")
    assert names["search"].best_estimator_.module_.prompt.num_parameters > 0
    assert dict(names["search"].best_estimator_.callbacks_)["FrozenCheck"].reports_
