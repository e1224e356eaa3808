"""Two processes train one prompt, equal to one process up to rounding; what they cannot train is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from launch import SCRIPTS, results
from processes import mpt, train
from torch.distributed.fsdp import StateDictType
from untouched import untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError, UnsupportedModelError
from softhooks.trainer import launch

METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4)}
WAYS = {
    "ddp": {
        "prompt": "shared", "prefix": "attention", "mpt-tasks": "shared", "mpt-taught": "shared", "cpt": "shared",
        "p-tuning": "shared", "p-tuning-v2-projection": "attention", "adapter": "branch", "cartridge-distilled": "attention",
    },
    "fsdp": {"prompt": "slots", "prefix": "attention", "adapter": "branch", "p-tuning": "slots", "mpt-tasks": "slots"},
}  # fmt: skip
"""What trains under each wrapper, and how each enters."""


def _alone(folder: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """The same training in one process, which accumulates the batches of both processes before each step."""
    method, rows = train.entry_of(name)
    model = zoo.build("llama")
    torch.manual_seed(7)
    trainer, callback = training.prompted(
        folder, model, "causal", method, given={"train_dataset": rows, "eval_dataset": rows},
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    return training.losses(trainer), training.trained(callback), trainer.evaluate()["eval_loss"]


def _close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Up to rounding, which Adam enlarges for tiny gradients to at most a hundredth of a step."""
    atol = training.QUIET["learning_rate"] / 100
    return set(one) == set(other) and all(torch.allclose(one[name], other[name], atol=atol) for name in one)


@pytest.mark.parametrize("wrapper", WAYS)
def test_two_processes_train_and_resume_as_one_does(tmp_path: Path, wrapper: str) -> None:
    first, second = results(tmp_path, SCRIPTS / "train.py", wrapper, tmp_path)
    for name, way in WAYS[wrapper].items():
        losses, trained, evaluated = _alone(tmp_path / "alone" / name, name)
        assert first[name]["way"] == way
        assert first[name]["losses"] == pytest.approx(losses, abs=2e-5)
        assert first[name]["evaluated"] == second[name]["evaluated"] == pytest.approx(evaluated, abs=2e-5)
        assert first[name]["checked"] == 23
        for run in (name, f"{name} resumed"):
            assert _close(first[run]["trained"], trained)
            assert training.equal(first[run]["trained"], second[run]["trained"])
        assert first[f"{name} resumed"]["losses"] == first[name]["losses"]
        assert training.equal(first[f"{name} resumed"]["trained"], first[name]["trained"])
    for name in METHODS:
        _check_saved(tmp_path / name, name, first[name]["trained"])
    if wrapper == "fsdp":
        _check_sharded(first, second)


def _check_saved(folder: Path, name: str, trained: dict[str, torch.Tensor]) -> None:
    """The saved prompt and the checkpoint give the outputs of the trained model."""
    batch = tf.default_data_collator(training.rows("causal"))
    outputs = []
    for saved in (folder / "saved", folder / "checkpoint-4"):
        model = zoo.build("llama")
        softhooks.load(model, saved)
        with torch.no_grad():
            outputs.append(model(**batch).logits)
    model = zoo.build("llama")
    prompt = softhooks.attach(model, METHODS[name])
    model.load_state_dict(trained, strict=False)
    with torch.no_grad():
        outputs.append(model(**batch).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert prompt.injection == WAYS["ddp"][name]


def _check_sharded(*ranks: dict[str, Any]) -> None:
    for seen in ranks:
        again = seen["adapter, layers run again"]
        assert again["losses"] == pytest.approx(seen["adapter"]["losses"], abs=2e-5)
        assert _close(again["trained"], seen["adapter"]["trained"])
        assert seen["asked"].startswith(
            "TrainerError: injection='shared' is not available under FSDP; methods that train input embeddings can use only"
        )
        assert "'shared'" in seen["asked"]
        assert "needs a causal language model that computes the prompt once" in seen["context"]
        assert "without FSDP" in seen["context"]
        assert seen["bare loop"].startswith(
            "UnsupportedModeError: injection='shared' computes the prompt once for all rows"
        )
        assert "injection='slots'" in seen["bare loop"]
        assert "already sharded" in seen["late"]
        assert "with `SHARDED_STATE_DICT` the Trainer writes sharded checkpoints" in seen["in shards"]
        assert "'state_dict_type': 'FULL_STATE_DICT'" in seen["in shards"]
        assert seen["rows"].startswith("UnsupportedModeError: the rows of this batch use different gated branches")


def test_models_and_callbacks_that_come_late_are_shared_too(tmp_path: Path) -> None:
    first, second = results(tmp_path, SCRIPTS / "train.py", "late", tmp_path)
    for way in ("of_model_init", "added"):
        assert len(first[way]["losses"]) == 4
        assert first[way]["checked"] == 23
        assert training.equal(first[way]["trained"], second[way]["trained"])
        for rank in (first, second):
            assert training.equal(rank[f"{way} resumed"]["trained"], first[way]["trained"])
        assert first[f"{way} resumed"]["losses"] == first[way]["losses"]


def test_ranks_hold_one_prompt_or_say_so(tmp_path: Path) -> None:
    first, second = results(tmp_path, SCRIPTS / "train.py", "ranks", tmp_path)
    assert not torch.equal(first["own head"], second["own head"])
    assert training.equal(first["start"], second["start"])
    head = "soft_prompt.default.heads.classifier.weight"
    assert torch.equal(first["start"][head], first["own head"])
    assert training.equal(first["seeds"], second["seeds"])
    assert torch.equal(second["seeds"]["base"]["classifier.weight"], first["own head"])
    assert all(not torch.equal(value, first["start"][name]) for name, value in first["seeds"]["trained"].items())

    for seen in (first, second):
        assert seen["apart"].startswith("TrainerError: the prompt of rank 1 differs from that of rank 0;")
        assert "rank 1:" in seen["apart"]
        assert "soft_prompt.default.encoder.embeddings" in seen["apart"]
        assert seen["methods"].startswith("TrainerError: the method or model of rank 1 differs from that of rank 0;")
        assert "num_virtual_tokens=4" in seen["methods"]
        assert "num_virtual_tokens=5" in seen["methods"]


def test_teachers_and_students_train_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """Unused parameters are found by DDP, also with checkpointing; if DDP would not look for them, training is refused."""
    first, second = results(tmp_path, SCRIPTS / "mpt.py", tmp_path)
    alone = mpt.train(tmp_path / "alone", size=8, steps=1)
    for way in ("as it is", "again", "reentrant", "sharded", "sharded, again"):
        assert training.equal(first[way], second[way])
        assert set(first[way]) == set(alone)
        assert all(torch.allclose(first[way][name], alone[name], rtol=1e-5, atol=1e-6) for name in alone)
    for seen in (first, second):
        for name, found in {
            "checkpointing": "gradient_checkpointing=True",
            "not searching": "ddp_find_unused_parameters=False",
            "static": "ddp_static_graph=True",
            "loop": "find_unused_parameters=False",
            "loop of texts": "find_unused_parameters=False",
        }.items():
            method = "llama_adapter" if "texts" in name else "multitask_prompt_tuning"
            assert seen[name].startswith(f"TrainerError: {found}"), name
            assert f", but some parameters of {method} are unused in some steps" in seen[name]
            assert "`ddp_find_unused_parameters=True`" in seen[name]
        assert all(bool(tensor.isfinite().all()) for tensor in seen["in parts"].values())
        assert seen["saved in shards"].startswith(
            "TrainerError: save_strategy='steps' would save an optimizer state that torch cannot load under FSDP, because"
        )
        context = {"text_context_weight", "text_context_bias"}
        gradients = seen["gradients"]
        assert set(gradients["teachers"]) == {"shared", "left", "right"}, (
            "the vanilla prompts, in the third step, have none"
        )
        assert not context & set(gradients["texts"])
        assert context < set(gradients["images"])
        assert context < set(gradients["mixed"])
    assert training.equal(first["gradients"], second["gradients"])
    assert training.equal(first["in parts"], second["in parts"])


# --- launches that cannot be right ------------------------------------------------------------------------------------


class Plugin:
    """The part of accelerate's FSDP state that the callback reads."""

    def __init__(
        self,
        fsdp_version: int = 2,
        cpu_ram_efficient_loading: bool = False,
        state_dict_type: StateDictType = StateDictType.FULL_STATE_DICT,
    ) -> None:
        self.fsdp_version = fsdp_version
        self.cpu_ram_efficient_loading = cpu_ram_efficient_loading
        self.state_dict_type = state_dict_type


@pytest.mark.parametrize(
    ("plugin", "found", "remedy"),
    [
        (Plugin(fsdp_version=1), "FSDP 1", "fsdp_config={'version': 2}"),
        (Plugin(cpu_ram_efficient_loading=True), "cpu_ram_efficient_loading", "to false"),
        (Plugin(state_dict_type=StateDictType.SHARDED_STATE_DICT), "SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    ],
    ids=["fsdp1", "empty ranks", "in shards"],
)
def test_shardings_that_cannot_train_a_prompt_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: Plugin, found: str, remedy: str
) -> None:
    monkeypatch.setattr(launch, "fsdp_plugin", lambda: plugin)
    model = zoo.build("llama")
    with untouched(model), pytest.raises(TrainerError, match=found) as refused:
        training.prompted(tmp_path, model, "causal", METHODS["prefix"])
    assert remedy in str(refused.value)


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llama")
    arguments = tf.TrainingArguments(str(tmp_path), **training.QUIET)
    arguments._n_gpu = 2
    with pytest.raises(TrainerError, match="DataParallel") as refused:
        tf.Trainer(model=model, args=arguments, callbacks=[SoftPromptCallback(METHODS["prompt"])])
    assert "torchrun" in str(refused.value)
    assert softhooks.runtime.prompted_model.prompted_model_of(model) is None


ZERO_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}


@pytest.mark.parametrize("told_by", ["a file", "a configuration", "accelerate"])
def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [])
    if told_by == "accelerate":
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    else:
        trainer.args.deepspeed = ZERO_3 if told_by == "a configuration" else "zero3.json"
    callback = SoftPromptCallback(METHODS["prompt"])
    with untouched(model), pytest.raises(TrainerError, match="DeepSpeed") as refused:
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    assert "FSDP2" in str(refused.value)
    assert softhooks.runtime.prompted_model.prompted_model_of(model) is None


def test_weights_that_zero_3_has_taken_apart_are_refused() -> None:
    """A model as `zero.Init` leaves it: each weight is empty and records its shape."""
    model = zoo.build("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)
    with untouched(model), pytest.raises(UnsupportedModelError, match="partitioned by DeepSpeed") as refused:
        softhooks.attach(model, METHODS["prefix"])
    assert "FSDP2" in str(refused.value)


def test_a_callback_passes_its_injection_on(tmp_path: Path) -> None:
    callback = SoftPromptCallback(METHODS["prompt"], injection="slots")
    model = zoo.build("llama")
    attached = softhooks.attach(model, METHODS["prompt"])
    assert attached.injection == "shared"
    training.make(tmp_path, model, "causal", [callback])
    assert callback.soft_prompt is attached
    assert attached.injection == "slots"
