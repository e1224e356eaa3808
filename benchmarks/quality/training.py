"""Train a contestant with a plain Trainer."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import softhooks
from benchmarks.quality.setup import Contestant, Prepared, Setup
from softhooks.compat.quiet import without_warnings

BATCH = 8
WARMUP = 0.06
"""The share of the steps in which the learning rate rises to its peak.

It then falls to 0 linearly; the option `schedule` of a run sets another schedule of the Trainer.
"""


@dataclass(frozen=True)
class Trained:
    """A trained model, and the figures of its training."""

    model: Any
    trained: int
    saved_bytes: int
    seconds: float
    losses: list[float]


def train(contestant: Contestant, model: PreTrainedModel, setup: Setup, *, steps: int) -> Trained:
    """Prepare a contestant and train it for a number of optimizer steps; with 0 steps, only prepare it."""
    set_seed(setup.seed)
    return fit(contestant.prepare(model, setup), setup, steps=steps)


def fit(prepared: Prepared, setup: Setup, *, steps: int) -> Trained:
    """Train a prepared model with the learning rate and the seed of the setup."""
    with tempfile.TemporaryDirectory() as directory, without_warnings():
        trainer = Trainer(
            model=prepared.model,
            args=_arguments(directory, max(steps, 1), setup),
            train_dataset=prepared.dataset or setup.inputs.dataset(setup.rows),
            data_collator=setup.inputs.collator,
            callbacks=prepared.callbacks,  # they attach the prompt when the Trainer is created
        )
        if not steps:
            return Trained(prepared.model, 0, 0, 0.0, [])
        with softhooks.kept(prepared.model) if prepared.keep else nullcontext():
            output = trainer.train()
        parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        count = sum(parameter.numel() for parameter in parameters)
        saved = _saved_bytes(prepared, Path(directory) / "saved") if prepared.save else 4 * count
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(prepared.model, count, saved, output.metrics["train_runtime"], losses)


def _saved_bytes(prepared: Prepared, directory: Path) -> int:
    """Save what was trained, and return the size of the tensor files."""
    assert prepared.save is not None
    prepared.save(directory)
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def _arguments(directory: str, steps: int, setup: Setup) -> TrainingArguments:
    return TrainingArguments(
        output_dir=directory,
        use_cpu=True,  # times and memory are those of the CPU
        max_steps=steps,
        learning_rate=setup.learning_rate,
        lr_scheduler_type=setup.options.get("schedule", "linear"),
        warmup_steps=WARMUP,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="group_by_length",
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        seed=setup.seed,
    )
