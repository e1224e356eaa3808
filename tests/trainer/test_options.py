"""Every Trainer option with the callback: only the prompt and its head train, and a resumed run is the same run.

| options | what holds |
|---|---|
| schedulers, optimizers, accumulation, clipping, precision, checkpointing, loss, logs, evaluation, saving | as without a prompt |
| `save_only_model` | the prompt resumes exactly, its optimizer begins anew: the Trainer has written no state of it |
| `ignore_data_skip` | resumes exactly, on other rows: the Trainer begins the epoch again |
| `fp16` | needs a GPU: without one the Trainer itself refuses |
| `optim` of GaLore or APOLLO by layer, LOMO | refused: they train inside the backward and keep nothing to resume from |
| `bf16_full_eval`, `fp16_full_eval` before a training | refused: the Trainer converts the base |
| another `optim` in a resumed run | refused: its state would be the other's |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from table import TRAINED, Entry
from torch.nn import functional
from torch.utils.data import IterableDataset
from untouched import remove_all

import softhooks
from softhooks import SoftPromptCallback
from softhooks.trainer.optimizer import is_mended

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
BEST: dict[str, Any] = {**EVALUATING, "load_best_model_at_end": True, "metric_for_best_model": "score", "save_steps": 1}
COMPILED: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo does, of every tensor
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer trains in fp16 on a GPU only")

KNOWN = {item.name for item in dataclasses.fields(tf.Seq2SeqTrainingArguments)}

Given = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Option:
    """One way to use the Trainer.

    Attributes:
        name: what it shows.
        arguments: for `TrainingArguments`, beside four steps with a checkpoint after two.
        given: for the Trainer itself, made anew for each.
        callbacks: beside ours.
        task: another one than the method's own.
        package: what must be installed.
        is_exact: whether the Trainer resumes exactly with it.
        marks: of pytest.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    given: Given = dict
    callbacks: Callable[[], list[tf.TrainerCallback]] = list
    task: tuple[str, str] | None = None
    package: str | None = None
    is_exact: bool = True
    marks: tuple[Any, ...] = ()


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows without a length."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def scores() -> dict[str, Any]:
    values = iter([1.0, 5.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    return {"compute_metrics": lambda prediction: {"score": next(values)}}


def patient() -> list[tf.TrainerCallback]:
    return [tf.EarlyStoppingCallback(3)]


def in_batches() -> dict[str, Any]:
    return {"compute_metrics": lambda prediction, compute_result: {"seen": 1.0}}


def smallest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmin(-1)


def squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"]
    return (logits - functional.one_hot(labels, logits.shape[-1])).square().mean()


def scheduler(name: str, **kwargs: Any) -> Option:
    more = EVALUATING if name in ("reduce_lr_on_plateau", "greedy") else {}
    arguments = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": 1, **more}
    return Option(f"scheduler {name}", arguments)


def optimizer(name: str, package: str | None = None, **more: Any) -> Option:
    label = " ".join(["optimizer", name, *more.values()])
    return Option(label, {"optim": name, "weight_decay": 0.1, **more}, package=package)


def checkpointing(reentrant: bool) -> Option:
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    return Option(f"checkpointing, reentrant={reentrant}", arguments)


SEQ2SEQ: tuple[str, str] = ("t5", "seq2seq")
OPTIONS = [
    Option("plain"),
    Option("plain causal", task=("llama", "causal")),
    Option("plain sequence", task=("bert", "sequence")),
    Option("plain tokens", task=("bert", "tokens")),
    Option("plain seq2seq", task=SEQ2SEQ),
    *map(scheduler, ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")),
    *map(scheduler, ("inverse_sqrt", "reduce_lr_on_plateau", "greedy")),
    scheduler("cosine_with_min_lr", min_lr_rate=0.1),
    scheduler("cosine_warmup_with_min_lr", min_lr_rate=0.1),
    scheduler("warmup_stable_decay", num_decay_steps=2),
    *map(optimizer, ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")),
    optimizer("adafactor", optim_args="scale_parameter=True"),
    *[optimizer(name, "bitsandbytes") for name in ("adamw_bnb_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit")],
    *[optimizer(name, "schedulefree") for name in ("schedule_free_adamw", "schedule_free_sgd")],
    Option("momentum", given=lambda: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})}),
    Option("weight decay", {"weight_decay": 0.5}),
    Option("accumulation", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    Option("clipping", {"max_grad_norm": 1e-3}),
    Option("no clipping", {"max_grad_norm": 0.0}),
    Option("label smoothing", {"label_smoothing_factor": 0.1}),
    Option("neftune", {"neftune_noise_alpha": 5.0}),
    Option("auto_find_batch_size", {"auto_find_batch_size": True}),
    Option("bf16", {"bf16": True}),
    Option("bf16_full_eval in training", {"bf16_full_eval": True, **EVALUATING}),
    Option("fp16", {"fp16": True, "use_cpu": False}, marks=(GPU,)),
    checkpointing(True),
    checkpointing(False),
    Option("group_by_length", {"train_sampling_strategy": "group_by_length"}),
    Option("sequential", {"train_sampling_strategy": "sequential"}),
    Option("tokens seen", {"include_num_input_tokens_seen": "all"}),
    Option("tokens seen, no padding", {"include_num_input_tokens_seen": "non_padding"}),
    Option("save_only_model", {"save_only_model": True}, is_exact=False),
    Option("save_total_limit", {"save_total_limit": 2, "save_steps": 1}),
    Option("save each epoch", {"save_strategy": "epoch"}),
    Option("save the best", {**EVALUATING, "save_strategy": "best", "metric_for_best_model": "score"}, scores),
    Option("the best at the end", BEST, scores),
    Option("eval_on_start", {"eval_on_start": True}),
    Option("early stopping", BEST, scores, patient),
    Option("callbacks' states", {**BEST, "restore_callback_states_from_checkpoint": True}, scores, patient),
    Option("compute_metrics", {**EVALUATING, "include_for_metrics": ["inputs", "loss"]}, scores),
    Option("metrics in batches", {**EVALUATING, "batch_eval_metrics": True}, in_batches),
    Option("prediction_loss_only", {**EVALUATING, "prediction_loss_only": True}),
    Option("eval_accumulation_steps", {**EVALUATING, "eval_accumulation_steps": 1, "per_device_eval_batch_size": 2}, scores),
    Option("eval_do_concat_batches", {**EVALUATING, "eval_do_concat_batches": False}),
    Option("preprocess_logits_for_metrics", EVALUATING, lambda: {**scores(), "preprocess_logits_for_metrics": smallest}),
    Option("compute_loss_func", given=lambda: {"compute_loss_func": squared}, task=("bert", "sequence")),
    Option("predict_with_generate", {**EVALUATING, "predict_with_generate": True, "generation_max_length": 5}, task=SEQ2SEQ),
    Option("a stream", given=lambda: {"train_dataset": Stream}),
    Option("two evaluation sets", EVALUATING, lambda: {"eval_dataset": "both"}),
    Option("ignore_data_skip", {"ignore_data_skip": True, "save_steps": 3}, is_exact=False),
    Option("data_seed", {"data_seed": 7, "dataloader_drop_last": True}),
    Option("unused columns stay", {"remove_unused_columns": False}),
    Option("use_cache", {"use_cache": True}),
    Option("logs by epoch", {"logging_strategy": "epoch", "logging_first_step": True}),
    Option("memory metrics", {"skip_memory_metrics": False, "torch_empty_cache_steps": 1}),
    Option("checkpoint on SIGTERM", {"enable_jit_checkpoint": True}),
    Option("torch_compile", COMPILED, marks=(LOOKS_AT_GRAD,)),
]  # fmt: skip
CASES = [
    pytest.param(option, entry, id=f"{option.name}-{entry}", marks=option.marks)
    for option in OPTIONS
    for entry in TRAINED
    if option.task is None or entry.fits(zoo.Case(*option.task))
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()
    torch.compiler.reset()


def make(option: Option, entry: Entry, folder: Path) -> tuple[tf.Trainer, SoftPromptCallback, tuple[str, str]]:
    """A Trainer as a script would make it with an option, and one callback more."""
    arch, head = option.task or training.task_of(entry)
    given = option.given()
    rows = training.rows(head)
    if given.get("train_dataset") is Stream:
        given["train_dataset"] = Stream(rows)
    if given.get("eval_dataset") == "both":
        given["eval_dataset"] = {"one": rows[:2], "other": rows[2:4]}
    cls = tf.Seq2SeqTrainer if "predict_with_generate" in option.arguments else tf.Trainer
    callback = SoftPromptCallback(entry.make(4))
    arguments = {**SAVING, **option.arguments}
    model = zoo.build(arch, head)
    trainer = training.make(folder, model, head, [callback, *option.callbacks()], cls, given, **arguments)
    return trainer, callback, (arch, head)


def outcome(trainer: tf.Trainer, callback: SoftPromptCallback) -> tuple[Any, Any, Any]:
    assert trainer.optimizer is not None
    logs = [
        {k: v for k, v in log.items() if "runtime" not in k and "_second" not in k} for log in trainer.state.log_history
    ]
    return training.trained(callback), trainer.optimizer.state_dict(), [log for log in logs if "loss" in log]


@pytest.mark.parametrize(("option", "entry"), CASES)
def test_an_option_of_the_trainer(option: Option, entry: Entry, tmp_path: Path) -> None:
    if option.package is not None:
        pytest.importorskip(option.package)
    if not set(option.arguments) <= KNOWN or option.arguments.get("lr_scheduler_type", "linear") not in set(
        tf.SchedulerType
    ):
        pytest.skip("this transformers has no such option")
    trainer, callback, _ = make(option, entry, tmp_path)
    model: Any = trainer.model
    base, start = training.base_of(model), training.trained(callback)
    trainer.train()

    prompt = callback.soft_prompt
    assert prompt is not None
    assert callback.report is not None
    assert training.equal(training.base_of(model), base)
    after, state, logs = outcome(trainer, callback)
    assert not [name for name in after if torch.equal(after[name], start[name])], "something has not moved"
    assert all(name.startswith("soft_prompt.default.") for name in after)
    assert is_mended(trainer.optimizer, prompt)
    assert trainer.state.global_step == 4
    assert logs
    assert all(key in logs[-1] for key in ("soft_prompt/norm", "soft_prompt/grad_norm", "soft_prompt/distance"))

    data = training.rows((option.task or training.task_of(entry))[1])[:4]
    seen = trainer.predict(data)  # type: ignore[arg-type]
    with softhooks.disabled(model):
        bare = trainer.predict(data)  # type: ignore[arg-type]
    if "predict_with_generate" not in option.arguments:
        assert shapes(seen.predictions) == shapes(bare.predictions)
    assert shapes(seen.label_ids) == shapes(bare.label_ids)

    steps = sorted(int(folder.name.rpartition("-")[2]) for folder in tmp_path.glob("checkpoint-*"))
    checkpoint = tmp_path / f"checkpoint-{steps[-2]}"
    again, other, _ = make(option, entry, tmp_path)
    training.spoil(other)
    again.train(resume_from_checkpoint=str(checkpoint))
    resumed = outcome(again, other)
    assert training.equal(training.base_of(again.model), base)  # type: ignore[arg-type]
    compared = (
        2 if option.arguments.get("logging_strategy") == "epoch" else 3
    )  # the Trainer restores no half of an epoch's loss
    assert training.equal(resumed[:compared], (after, state, logs)[:compared]) == option.is_exact


@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_evaluations_and_predictions_around_two_trainings(entry: Entry, tmp_path: Path) -> None:
    def run(folder: Path, *steps: str) -> tuple[list[float], SoftPromptCallback, Any]:
        trainer, callback, (_, head) = make(Option("plain"), entry, folder)
        seen = []
        for step in steps:
            if step == "train":
                trainer.train()
            elif step == "evaluate":
                seen.append(trainer.evaluate()["eval_loss"])
            else:
                prediction = trainer.predict(training.rows(head)[:4])  # type: ignore[arg-type]
                seen.append(prediction.metrics["test_loss"])  # type: ignore[index]
        return seen, callback, trainer

    around = ("evaluate", "predict")
    seen, callback, trainer = run(tmp_path / "a", *around, "train", *around, "train", *around)
    assert seen[0] == seen[1] > seen[2] == seen[3] > seen[4] == seen[5]
    base = training.base_of(zoo.build(*training.task_of(entry)))
    assert training.equal(training.base_of(trainer.model), base)
    fresh = zoo.build(*training.task_of(entry))
    trainer.save_model(str(tmp_path / "saved"))
    softhooks.load(fresh, tmp_path / "saved")
    alone = training.make(tmp_path / "alone", fresh, training.task_of(entry)[1], [])
    assert alone.evaluate()["eval_loss"] == pytest.approx(seen[-1], rel=1e-6)
    assert callback.report is not None


def shapes(value: Any) -> Any:
    return [shapes(item) for item in value] if isinstance(value, (list, tuple)) else getattr(value, "shape", None)
