"""The Composer algorithm. Composer cannot be installed here: a stand-in calls its events in order (published.json) on a
real model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import composer_stand_in
import examples
import pytest
import torch
import training
import zoo
from published import FACTS, arguments, is_installed
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import AttachError, FrozenModifiedError, PrefixTuning, PromptTuning, SoftHooksError, TrainerError
from softhooks.integrations import composer as integration

pytestmark = pytest.mark.skipif(is_installed("composer"), reason="the stand-in would hide the real one")
METHOD = PrefixTuning(4, projection=True, hidden_size=16)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("composer", "composer.core", "composer.models"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that it is taken out again
    composer_stand_in.install()
    yield
    vars(integration).pop("SoftPromptAlgorithm", None)
    remove_all()


def make(folder: Path, method: Any = METHOD, duration: str = "3ep", **options: Any) -> tuple[Any, Any]:
    model = options.pop("model", None) or zoo.build("llama")
    torch.manual_seed(0)
    algorithm = integration.SoftPromptAlgorithm(method)
    optimizers = options.pop("optimizers", None) or torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped = options.pop("wrapped", None) or composer_stand_in.HuggingFaceModel(model)
    loader = torch.utils.data.DataLoader(training.rows("causal"), batch_size=4)
    trainer = composer_stand_in.Trainer(wrapped, optimizers, loader, duration, [algorithm], str(folder), **options)
    return trainer, algorithm


def trained(algorithm: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in algorithm.prompt.named_parameters()}


def test_the_hooks_take_what_composer_gives() -> None:
    for name, names in FACTS["composer"]["Algorithm"].items():
        assert arguments(getattr(integration.SoftPromptAlgorithm, name)) == names
    assert set(integration._EVENTS) <= set(FACTS["composer"]["Event"])


def test_only_the_prompt_trains_and_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer, whole = make(tmp_path / "whole", model=model)
    start = trained(whole)
    trainer.fit()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in base.items())
    assert not any(torch.equal(start[name], tensor) for name, tensor in trained(whole).items())
    assert whole.report.tensors >= len(base)
    held = torch.load(tmp_path / "whole" / "ep1.pt", weights_only=True)
    assert {*held["model"]} == {f"model.{name}" for name in start}
    assert len(held["optimizer"]["param_groups"][0]["params"]) == len(start)

    later, algorithm = make(tmp_path / "later", load_path=str(tmp_path / "whole" / "ep1.pt"))
    later.fit()
    assert training.equal(trained(algorithm), trained(whole))
    assert training.equal(later.state.optimizers[0].state_dict(), trainer.state.optimizers[0].state_dict())
    assert set(base) < set(model.state_dict())  # the model itself is whole


def test_what_the_making_of_optimizer_states_changes_is_undone(tmp_path: Path) -> None:
    """Composer creates them by a step of its own, between loading the model's part of a checkpoint and `AFTER_LOAD`."""
    make(tmp_path, duration="1ep")[0].fit()
    later, algorithm = make(tmp_path / "later")
    held = torch.load(tmp_path / "ep1.pt", weights_only=True)["model"]
    later.state.model.load_state_dict(held)
    with torch.no_grad():
        for parameter in algorithm.prompt.parameters():
            parameter.add_(1)
    later.tell("after_load")
    assert training.equal({f"model.{name}": tensor for name, tensor in trained(algorithm).items()}, held)


@pytest.mark.parametrize("method", [PrefixTuning(4), PrefixTuning(4, projection=True, hidden_size=8), PromptTuning(4)])
def test_a_checkpoint_of_another_prompt_is_refused_before_it_is_loaded(tmp_path: Path, method: Any) -> None:
    make(tmp_path, duration="1ep")[0].fit()
    model = zoo.build("llama")
    with pytest.raises(TrainerError, match="names and shapes must match"):
        make(tmp_path, method, model=model, load_path=str(tmp_path / "ep1.pt"))


def test_what_cannot_be_right_is_refused_and_the_model_untouched(tmp_path: Path) -> None:
    model = zoo.build("llama")
    two = [torch.optim.SGD(model.parameters()) for _ in range(2)]
    with untouched(model):
        for options, says in (
            ({"optimizers": two}, "has 2 optimizers"),
            ({"fsdp_config": {}}, "uses fsdp_config"),
            ({"tp_config": {}}, "uses tp_config"),
            ({"wrapped": torch.nn.Linear(2, 2)}, "is a Linear(.|\n)*must be a HuggingFaceModel"),
        ):
            with pytest.raises(TrainerError, match=says):
                make(tmp_path, model=model, **options)
    softhooks.attach(model, PromptTuning(2), "early")
    with untouched(model), pytest.raises(AttachError, match="'early'"):
        make(tmp_path, model=model)


def test_a_fit_with_other_parameters_or_without_a_gradient_or_with_a_moving_base_is_an_error(tmp_path: Path) -> None:
    trainer, algorithm = make(tmp_path)
    weight = trainer.state.model.model.model.norm.weight
    trainer.state.optimizers[0].add_param_group({"params": [weight]})
    with pytest.raises(TrainerError, match="exactly the trainable parameters"):
        trainer.fit()
    trainer.state.optimizers[0].param_groups.pop()
    with pytest.raises(TrainerError, match="no gradient reached the prompt"):
        trainer.tell("after_train_batch")
    with torch.no_grad():
        weight[0] += 1
    with pytest.raises(FrozenModifiedError, match=r"norm\.weight"):
        trainer.fit()
    algorithm.prompt.remove()
    with pytest.raises(SoftHooksError, match="removed"):
        trainer.fit()


def test_a_prompt_that_is_asked_for_too_early_is_an_error() -> None:
    with pytest.raises(TrainerError, match="Composer's Trainer attaches it when it is created"):
        _ = integration.SoftPromptAlgorithm(METHOD).prompt


def test_without_composer_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "composer.core", None)
    with pytest.raises(SoftHooksError, match=r"Composer \(mosaicml\) is not installed"):
        _ = integration.SoftPromptAlgorithm
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = integration.Missing


def test_the_example_runs() -> None:
    assert examples.run("composer")["algorithm"].report.tensors > 0
