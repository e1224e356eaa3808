"""Tiny trainings: rows for every head, a quiet Trainer, and what to compare afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import zoo
from table import LEARNERS, Entry
from untouched import leave_libraries_alone

from softhooks import SoftPromptCallback
from softhooks.method import Method

TASKS = [("llama", "causal"), ("bert", "sequence"), ("bert", "tokens"), ("t5", "seq2seq")]
QUIET: dict[str, Any] = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 2e-2,
    "max_steps": 4,
    "seed": 1,
}


def rows(
    head: str, count: int = 8, length: int = 6, end: bool = False, entry: Entry | None = None
) -> list[dict[str, torch.Tensor]]:
    """A data set that a prompt can learn by heart, with the columns that an entry of the table asks for."""
    found = []
    for number in range(count):
        ids = zoo.text(1, length, seed=number, end=end)[0]
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = {"causal": ids, "sequence": torch.tensor(number % 3), "tokens": ids % 3, "seq2seq": ids.flip(0)[:4]}
        more = {} if entry is None else {name: value[0] for name, value in entry.extra([number]).items()}
        found.append({**row, **more, "labels": labels[head].clone()})
    return found


def make(
    folder: Path,
    model: Any,
    head: str,
    callbacks: Sequence[tf.TrainerCallback],
    cls: type[tf.Trainer] = tf.Trainer,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> tf.Trainer:
    """A Trainer as a script would make it; `given` goes to the Trainer, `options` to its arguments."""
    leave_libraries_alone()
    arguments = tf.Seq2SeqTrainingArguments if cls is tf.Seq2SeqTrainer else tf.TrainingArguments
    data = rows(head)
    trainer = cls(
        **({} if model is None else {"model": model}),
        args=arguments(str(folder), **{**QUIET, **options}),
        callbacks=list(callbacks),
        **{"train_dataset": data, "eval_dataset": data[:4], **(given or {})},
    )
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def prompted(
    folder: Path, model: Any, head: str, method: Method, *more: tf.TrainerCallback, **options: Any
) -> tuple[tf.Trainer, SoftPromptCallback]:
    """A Trainer with a SoftPromptCallback."""
    callback = SoftPromptCallback(method)
    return make(folder, model, head, [callback, *more], **options), callback


def learning(
    folder: Path, entry: Entry, *more: tf.TrainerCallback, method: Method | None = None, **options: Any
) -> tuple[tf.Trainer, SoftPromptCallback]:
    """A Trainer of an entry of the table, on a task and rows that suit it; always the same."""
    arch, head = task_of(entry)
    model, data = zoo.build(arch, head), rows(head, entry=entry)
    given = {"train_dataset": data, "eval_dataset": data[:4], **options.pop("given", {})}
    return prompted(folder, model, head, method or entry.make(4), *more, given=given, **options)


def task_of(entry: Entry) -> tuple[str, str]:
    """The task of a method: the methods of the table take turns over the tasks that suit them."""
    number = LEARNERS.index(entry) % len(TASKS)
    rotated = TASKS[number:] + TASKS[:number]
    return next(task for task in rotated if entry.fits(zoo.Case(*task)))


def spoil(callback: SoftPromptCallback) -> None:
    """Overwrite the trained parameters, so that only loading can restore them."""
    assert callback.soft_prompt is not None
    with torch.no_grad():
        for parameter in callback.soft_prompt.parameters():
            parameter.fill_(0.123)


def logs(trainer: tf.Trainer) -> list[dict[str, Any]]:
    """The logs of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer: tf.Trainer) -> list[float]:
    """The logged training losses, step by step."""
    return [entry["loss"] for entry in logs(trainer)]


def trained(callback: SoftPromptCallback) -> dict[str, torch.Tensor]:
    """Copies of everything that is trained."""
    prompt = callback.soft_prompt
    assert prompt is not None
    return {name: parameter.detach().clone() for name, parameter in prompt.named_parameters()}


def base_of(model: torch.nn.Module, but: str = "soft_prompt.") -> dict[str, torch.Tensor]:
    """Copies of every tensor of the base."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if but not in name}


def equal(one: Any, other: Any) -> bool:
    """Whether nested containers hold the same tensors, bit for bit, and the same values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def bits(folder: Path) -> int:
    """The number of bytes of a folder's files that the Trainer does not write itself."""
    trainers = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin")
    return sum(file.stat().st_size for file in folder.iterdir() if file.name not in trainers)


@contextmanager
def logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Collect what transformers and softhooks log."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keep = Keep(level)
    before = tf.logging.get_verbosity()
    tf.logging.set_verbosity(level)
    loggers = [logging.getLogger("transformers"), logging.getLogger("softhooks")]
    for logger in loggers:
        logger.addHandler(keep)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(keep)
        tf.logging.set_verbosity(before)
