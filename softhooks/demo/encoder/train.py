"""The training code of the demo: plain Hugging Face Trainers, with `callbacks` added to train a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments, set_seed

from softhooks.base_model.frozen_record import FrozenRecord, FrozenReport
from softhooks.demo.encoder.data import EncodedData
from softhooks.demo.models import Checkpoint
from softhooks.load import load
from softhooks.method import Method
from softhooks.trainer.callback import SoftPromptCallback

Logits: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run."""

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Result:
    """The result of a training run.

    Attributes:
        logits: the logits of the test rows, [rows, classes].
        trained: the number of trained parameters.
        seconds: the training time, excluding saving and evaluation.
        checkpoint: the directory that `trainer.save_model` wrote.
        frozen: the result of the check that the base model is unchanged.
    """

    logits: Logits
    trained: int
    seconds: float
    checkpoint: Path
    frozen: FrozenReport

    @property
    def checkpoint_bytes(self) -> int:
        """The size of the checkpoint's files, except the tokenizer and the training arguments."""
        extras = ("tokenizer", "special_tokens", "vocab", "training_args")
        return sum(file.stat().st_size for file in self.checkpoint.iterdir() if not file.name.startswith(extras))


def train_soft_prompt(
    method: Method, checkpoint: Checkpoint, data: EncodedData, recipe: Recipe, directory: Path
) -> Result:
    """Train a prompt and the new head on the frozen model."""
    set_seed(recipe.seed)
    model = checkpoint.classifier(data.tokenizer, data.labels)
    callback = SoftPromptCallback(method)
    trainer = Trainer(
        model=model,
        args=training_arguments(recipe, directory),
        train_dataset=data.train,
        data_collator=DataCollatorWithPadding(data.tokenizer),
        callbacks=[callback],
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(directory))
    logits = predict(model, data, directory)
    soft_prompt = callback.soft_prompt
    assert soft_prompt is not None  # attached by the callback
    result = Result(logits, soft_prompt.num_parameters, seconds, directory, soft_prompt.verify_frozen())
    soft_prompt.remove()
    return result


def train_head(checkpoint: Checkpoint, data: EncodedData, recipe: Recipe, directory: Path) -> Result:
    """Train the new head alone, without softhooks: freeze the base by hand, and save the whole model."""
    set_seed(recipe.seed)
    model = checkpoint.classifier(data.tokenizer, data.labels)
    model.base_model.requires_grad_(False)
    base = model.base_model_prefix + "."
    record = FrozenRecord(model, lambda name: name.startswith(base))
    trainer = Trainer(
        model=model,
        args=training_arguments(recipe, directory),
        train_dataset=data.train,
        data_collator=DataCollatorWithPadding(data.tokenizer),
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(directory))
    logits = predict(model, data, directory)
    return Result(logits, model.num_parameters(only_trainable=True), seconds, directory, record.verify(model))


def load_and_predict(checkpoint: Checkpoint, data: EncodedData, seed: int, directory: Path) -> Logits:
    """Load a saved prompt and its head onto a fresh model, and return the logits of the test rows."""
    set_seed(seed)
    model = checkpoint.classifier(data.tokenizer, data.labels)
    load(model, directory)
    return predict(model, data, directory)


def predict(model: PreTrainedModel, data: EncodedData, directory: Path) -> Logits:
    """Return the logits of the test rows in dataset order; unlike during training, rows are not grouped by length."""
    arguments = TrainingArguments(
        output_dir=str(directory), per_device_eval_batch_size=64, report_to="none", dataloader_pin_memory=False
    )
    trainer = Trainer(model=model, args=arguments, data_collator=DataCollatorWithPadding(data.tokenizer))
    output = trainer.predict(data.test)
    assert np.array_equal(np.asarray(output.label_ids), data.test.labels)  # the rows are in the order of the data
    return np.asarray(output.predictions)


def training_arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    """Return the arguments of a training run; the runs of the demo differ only in learning rate and epochs."""
    return TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        per_device_train_batch_size=recipe.batch_size,
        train_sampling_strategy="group_by_length",
        logging_strategy="epoch",
        save_strategy="no",
        disable_tqdm=False,  # otherwise, the low verbosity of the demo would hide the progress bar
        report_to="none",
        dataloader_pin_memory=False,
        seed=recipe.seed,
    )
