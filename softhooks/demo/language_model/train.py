"""The training script of the demo: a plain Hugging Face Trainer; `callbacks` is all that a prompt needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from softhooks.base_model.frozen_record import FrozenReport
from softhooks.demo.language_model.accuracy import accuracy
from softhooks.demo.language_model.task import IGNORED, Task
from softhooks.demo.models import Checkpoint
from softhooks.method import Method
from softhooks.trainer.callback import SoftPromptCallback


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run."""

    steps: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Curves:
    """What the Trainer logged: (step, training loss) and (step, accuracy on the development rows)."""

    losses: list[tuple[float, float]]
    accuracies: list[tuple[float, float]]


@dataclass(frozen=True)
class TrainedPrompt:
    """The result of a training run: the model with its prompt, and figures for the report."""

    model: PreTrainedModel
    directory: Path
    parameters: int
    seconds: float
    frozen: FrozenReport
    curves: Curves

    @property
    def saved_bytes(self) -> int:
        """The size of the saved prompt."""
        return sum(file.stat().st_size for file in self.directory.glob("soft_prompt*"))


def train_prompt(method: Method, checkpoint: Checkpoint, task: Task, recipe: Recipe, directory: Path) -> TrainedPrompt:
    """Train a prompt on a frozen language model, and save it."""
    set_seed(recipe.seed)
    model = checkpoint.language_model()
    callback = SoftPromptCallback(method)
    trainer = Trainer(
        model=model,
        args=_arguments(recipe, directory),
        train_dataset=task.dataset(task.train),
        eval_dataset=task.dataset(task.development),
        data_collator=DataCollatorForSeq2Seq(task.tokenizer),
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=_answers(task),
        callbacks=[callback],
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(directory))
    prompt = callback.soft_prompt
    assert prompt is not None  # attached by the callback
    log = trainer.state.log_history
    curves = Curves(
        losses=[(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        accuracies=[(entry["step"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry],
    )
    return TrainedPrompt(model, directory, prompt.num_parameters, seconds, prompt.verify_frozen(), curves)


def _arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=0.2,  # five times
        eval_on_start=True,
        save_strategy="no",
        disable_tqdm=False,  # otherwise, the low verbosity of the demo would hide the progress bar
        report_to="none",
        dataloader_pin_memory=False,
        seed=recipe.seed,
    )


def _answers(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that keeps the predicted package of each row, [B], instead of all logits."""
    label_ids = torch.tensor(task.label_ids)

    def predicted(logits: Tensor, labels: Tensor) -> Tensor:
        before_answer = (labels != IGNORED).int().argmax(1) - 1
        rows = torch.arange(len(labels), device=logits.device)
        return label_ids.to(logits.device)[logits[rows, before_answer][:, label_ids].argmax(-1)]

    return predicted


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    references = [next(label for label in row if label != IGNORED) for row in evaluated.label_ids]
    return accuracy(evaluated.predictions, references)
