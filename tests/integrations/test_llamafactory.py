"""LLaMA-Factory. It cannot be installed here: a stand-in for its `run_exp`, with the published arguments, passes the
callbacks to a real Trainer as its `run_sft` does. Where it is installed, the record is compared with its source.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import examples
import pytest
import training
import transformers as tf
import zoo
from published import FACTS, arguments, is_installed
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, SoftHooksError, TrainerError
from softhooks.integrations import llamafactory as integration

METHOD = PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1)
GOOD = {"stage": "sft", "finetuning_type": "full", "do_train": True}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As `llamafactory.train.tuner` does: its own callbacks are appended, and the Trainer gets them."""

    def run_exp(args: Any = None, callbacks: Any = None) -> None:
        if not args["do_train"]:
            return
        callbacks = callbacks or []
        callbacks.append(tf.TrainerCallback())
        trainer = training.make(
            Path(args["output_dir"]), args["model"], "causal", callbacks, tf.Seq2SeqTrainer,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=args.get("resume_from_checkpoint"))
        trainer.save_model()

    assert arguments(run_exp) == FACTS["llamafactory"]["functions"]["run_exp"]
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules["llamafactory.train"], "tuner", sys.modules["llamafactory.train.tuner"], raising=False
    )
    monkeypatch.setattr(sys.modules["llamafactory.train.tuner"], "run_exp", run_exp, raising=False)
    return run_exp


def test_it_trains_the_prompt_only_saves_it_only_and_resumes_bit_for_bit(stand_in: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    whole = integration.run_exp({**GOOD, "model": model, "output_dir": str(tmp_path / "whole")}, METHOD)
    assert training.equal(training.base_of(model), base)
    assert whole.report is not None
    names = {file.name for file in (tmp_path / "whole").glob("*.*")}
    assert {"soft_prompt.json", "soft_prompt.safetensors"} <= names
    assert not names & {"config.json", "model.safetensors"}
    softhooks.load(zoo.build("llama"), tmp_path / "whole").remove()
    later = integration.run_exp(
        {
            **GOOD,
            "model": zoo.build("llama"),
            "output_dir": str(tmp_path / "later"),
            "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"),
        },
        METHOD,
    )
    assert training.equal(training.trained(later), training.trained(whole))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"finetuning_type": "lora"}, "finetuning_type: full"),
        ({"finetuning_type": None}, "finetuning_type: full"),
        ({"stage": "dpo"}, "stage: dpo"),
        ({"stage": "rm"}, "stage: rm"),
        *(({name: "on"}, name) for name in integration._UNSUPPORTED),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    stand_in: Any, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(TrainerError, match=says):
        integration.run_exp({**GOOD, **change}, METHOD)


def test_adapters_are_the_default_and_refused() -> None:
    with pytest.raises(TrainerError, match="finetuning_type: lora"):
        integration.callback_for({}, METHOD)


def test_ray_is_refused(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_RAY", "1")
    with pytest.raises(TrainerError, match="USE_RAY"):
        integration.run_exp(GOOD, METHOD)


def test_a_command_that_does_not_train_is_an_error(stand_in: Any) -> None:
    with pytest.raises(TrainerError, match="do_train: true"):
        integration.run_exp({**GOOD, "do_train": False}, METHOD)


def test_without_llamafactory_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llamafactory.train", None)
    with pytest.raises(SoftHooksError, match="LLaMA-Factory is not installed"):
        integration.run_exp(GOOD, METHOD)


@pytest.mark.skipif(not is_installed("llamafactory"), reason="LLaMA-Factory conflicts with these versions")
def test_the_record_is_what_llamafactory_publishes() -> None:
    from llamafactory.train.tuner import run_exp

    assert arguments(run_exp) == FACTS["llamafactory"]["functions"]["run_exp"]


def test_the_example_runs() -> None:
    names = examples.run("llamafactory")
    assert names["callback"].report.tensors > 0
