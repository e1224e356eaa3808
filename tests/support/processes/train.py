"""Trainings in one of two processes: `train.py SCENARIO FOLDER`; writes its results to `rankN.pt`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import training
import transformers as tf
import zoo
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from launch import leave
from table import BY_NAME
from torch.serialization import register_package

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, SoftHooksError, SoftPromptCallback
from softhooks.method import Method

METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4)}
MORE = ("mpt-tasks", "mpt-taught", "cpt", "p-tuning", "p-tuning-v2-projection", "adapter", "cartridge-distilled")
"""What trains with DDP beside them, of the table of methods."""

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
TOGETHER = 4  # rows in a step, over all processes


class Sharded(tf.Trainer):
    """A Trainer that shards on the CPU: accelerate keeps FSDP for accelerators, though all the rest of it works here."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


SHARDING: dict[str, Any] = {
    "cls": Sharded,
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def make(folder: Path, model: Any, head: str, callbacks: list[Any], **options: Any) -> tf.Trainer:
    """Make a Trainer of one of `processes`, which together use as many rows per step as one process would."""
    processes = PartialState(cpu=True, backend="gloo").num_processes
    per_process = {"per_device_train_batch_size": TOGETHER // processes, "ddp_backend": "gloo"}
    return training.make(folder, model, head, callbacks, **{**per_process, **options})


def entry_of(name: str) -> tuple[Method, list[dict[str, torch.Tensor]]]:
    """A method and its rows, always the same; without dropout, because each process draws its own."""
    torch.manual_seed(5)
    if name in METHODS:
        return METHODS[name], training.rows("causal")
    method: Any = BY_NAME[name].make(4)
    if hasattr(method, "dropout"):
        method = dataclasses.replace(method, dropout=0.0)
    return method, training.rows("causal", entry=BY_NAME[name])


def train_and_resume(folder: Path, names: Iterable[str], **options: Any) -> dict[str, Any]:
    """Train each method, then resume it from the middle on a new model."""
    seen: dict[str, Any] = {}
    for name in names:
        method, rows = entry_of(name)
        given = {"train_dataset": rows, "eval_dataset": rows}
        model = zoo.build("llama")
        callback = SoftPromptCallback(method)
        torch.manual_seed(7)
        trainer = make(folder / name, model, "causal", [callback], given=given, **SAVING, **options)
        assert callback.soft_prompt is not None
        seen[name] = {"way": callback.soft_prompt.injection}
        trainer.train()
        seen[name] |= state(trainer, callback) | {"evaluated": trainer.evaluate()["eval_loss"]}
        callback.soft_prompt.save_pretrained(folder / name / "saved")

        again = SoftPromptCallback(method)
        torch.manual_seed(8)
        resumed = make(folder / f"{name}-again", zoo.build("llama"), "causal", [again], given=given, **options)
        resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        seen[f"{name} resumed"] = state(resumed, again)
    return seen


def state(trainer: tf.Trainer, callback: SoftPromptCallback) -> dict[str, Any]:
    """The results of a training."""
    whole = {name: softhooks.compat.sharding.full(value) for name, value in training.trained(callback).items()}
    assert callback.report is not None
    return {"losses": training.losses(trainer), "trained": whole, "checked": callback.report.tensors}


def refusal(attempt: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        attempt()
    except SoftHooksError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def ddp(folder: Path, rank: int) -> dict[str, Any]:
    """Train and resume."""
    return train_and_resume(folder, (*METHODS, *MORE))


def fsdp(folder: Path, rank: int) -> dict[str, Any]:
    """Train and resume in sharded models; record the refusals."""
    seen: dict[str, Any] = train_and_resume(folder, (*METHODS, "adapter", "p-tuning", "mpt-tasks"), **SHARDING)
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    method, rows = entry_of("adapter")
    torch.manual_seed(7)
    adapter, given = SoftPromptCallback(method), {"train_dataset": rows}
    trainer = make(folder / "again", zoo.build("llama"), "causal", [adapter], given=given, **again, **SHARDING)
    trainer.train()
    seen["adapter, layers run again"] = state(trainer, adapter)

    shared = SoftPromptCallback(METHODS["prompt"], injection="shared")
    seen["asked"] = refusal(lambda: make(folder / "x", zoo.build("llama"), "causal", [shared], **SHARDING))
    context, _ = entry_of("cpt")
    learner = SoftPromptCallback(context)
    seen["context"] = refusal(lambda: make(folder / "w", zoo.build("llama"), "causal", [learner], **SHARDING))
    in_shards = {**SHARDING, "fsdp_config": {**SHARDING["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
    prefix = SoftPromptCallback(METHODS["prefix"])
    seen["in shards"] = refusal(lambda: make(folder / "z", zoo.build("llama"), "causal", [prefix], **in_shards))
    ids = zoo.text()
    model = zoo.build("llama")
    for name in ("one", "other"):
        softhooks.attach(model, LlamaAdapter(3), name)
    shard(model)
    with softhooks.rows(model, ["one", "other"]):
        seen["rows"] = refusal(lambda: model(input_ids=ids))
    model = zoo.build("llama")
    prompt = softhooks.attach(model, METHODS["prompt"])
    shard(model)
    seen["bare loop"] = refusal(lambda: model(input_ids=ids, labels=ids).loss.backward())
    late = SoftPromptCallback(PrefixTuning(2), name="late")
    prompt.remove()
    seen["late"] = refusal(lambda: make(folder / "y", model, "causal", [late], **SHARDING))
    return seen


def shard(model: Any) -> None:
    """Shard a model, each layer by itself."""
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)


class Nudge(tf.TrainerCallback):
    """A callback that changes the prompt on one rank only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank == 1:
            with torch.no_grad():
                next(kwargs["model"].soft_prompt.parameters()).view(-1)[0] += 1


def ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks that start with different random numbers, or diverge."""
    seen: dict[str, Any] = {}
    model = zoo.build("bert", "sequence")
    torch.manual_seed(rank)
    model.classifier.reset_parameters()
    seen["own head"] = model.classifier.weight.detach().clone()
    callback = SoftPromptCallback(METHODS["prompt"])
    trainer = make(folder / "seeds", model, "sequence", [callback])
    seen["start"] = training.trained(callback)
    trainer.train()
    seen["seeds"] = state(trainer, callback) | {"base": training.base_of(model)}

    nudged = SoftPromptCallback(METHODS["prompt"])
    apart = make(folder / "apart", zoo.build("llama"), "causal", [nudged, Nudge(rank)])
    seen["apart"] = refusal(apart.train)
    other = SoftPromptCallback(PromptTuning(4 + rank))
    seen["methods"] = refusal(lambda: make(folder / "methods", zoo.build("llama"), "causal", [other]))
    return seen


def late(folder: Path, rank: int) -> dict[str, Any]:
    """Models of `model_init` and callbacks of `add_callback`, on ranks with other random numbers; then from the middle."""

    def build() -> Any:
        model = zoo.build("llama")
        torch.manual_seed(rank)  # from here on ranks would choose different words to start from
        return model

    def of_model_init(name: str, callback: SoftPromptCallback, **options: Any) -> tf.Trainer:
        return make(folder / name, None, "causal", [callback], given={"model_init": build}, **options)

    def added(name: str, callback: SoftPromptCallback, **options: Any) -> tf.Trainer:
        trainer = make(folder / name, build(), "causal", [], **options)
        trainer.add_callback(callback)
        return trainer

    seen: dict[str, Any] = {}
    for way in (of_model_init, added):
        name, callback = way.__name__, SoftPromptCallback(METHODS["prompt"])
        trainer = way(name, callback, **SAVING)
        trainer.train()
        seen[name] = state(trainer, callback)
        again = SoftPromptCallback(METHODS["prompt"])
        resumed = way(f"{name}-again", again)
        resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        seen[f"{name} resumed"] = state(resumed, again)
    return seen


def main() -> None:
    """Run one scenario and write its results."""
    torch.set_num_threads(1)
    # Older versions of accelerate call the CPU of the first process "cpu:0"; torch cannot load an optimizer's state to that.
    register_package(5, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None)
    tf.logging.set_verbosity_error()
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    rank = PartialState(cpu=True, backend="gloo").process_index
    seen = {"ddp": ddp, "fsdp": fsdp, "ranks": ranks, "late": late}[scenario](folder, rank)
    torch.save(seen, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main()
