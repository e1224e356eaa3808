"""Tiny trainings of context-aware prompt tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import torch
import training
import transformers as tf
import zoo
from contexts import padded, ragged
from torch import Tensor

from softhooks import ContextAwarePromptTuning, SoftPromptCallback


def data(count: int = 8) -> list[dict[str, Any]]:
    """Rows whose texts and labels have different lengths."""
    found = []
    for seed in range(count // 4):
        rows, labels = ragged(seed * 20)
        found += [{"input_ids": row, "labels": wanted} for row, wanted in zip(rows, labels, strict=True)]
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded([row["input_ids"] for row in rows], [row["labels"] for row in rows])
    if "example_ids" in rows[0]:
        batch["example_ids"] = torch.tensor([row["example_ids"] for row in rows])
    return batch


def make(
    folder: Path,
    model: Any,
    own: ContextAwarePromptTuning,
    *more: Any,
    rows: Any = None,
    given: Any = None,
    **options: Any,
) -> tuple[tf.Trainer, SoftPromptCallback]:
    callback = SoftPromptCallback(own)
    arguments = tf.TrainingArguments(str(folder), **{**training.QUIET, **options})
    trainer = tf.Trainer(
        model, arguments, train_dataset=data() if rows is None else rows, eval_dataset=data(4), data_collator=collate,
        callbacks=[callback, *more], **(given or {}),
    )  # fmt: skip
    trainer.remove_callback(tf.PrinterCallback)
    return trainer, callback


def model_of(arch: str = "llama") -> Any:
    return naive.without_dropout(zoo.build(arch))
