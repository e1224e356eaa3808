"""What both tasks of `softhooks train` return: encoded rows and the functions that measure predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from softhooks.layout.tokenizing import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Encoded:
    """Rows for a Trainer.

    Attributes:
        train, validation: the encoded rows.
        collate: the data collator.
        metric: the name of the metric: `accuracy` or `exact_match`.
        compute_metrics, keep: the Trainer's `compute_metrics` and `preprocess_logits_for_metrics`.
        majority: the share of validation rows with the most frequent answer, or None without validation rows.
        labels: the class names, or an empty tuple for a language model.
        truncated: the number of rows that were longer than the maximum length.
    """

    train: Dataset
    validation: Dataset | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    metric: str
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    keep: Callable[[Any, Tensor], Tensor]
    majority: float | None
    labels: tuple[str, ...] = ()
    truncated: int = 0


def best_ids(logits: Any, labels: Tensor) -> Tensor:
    """Return the most likely token or class of each position instead of all logits: [B, T, V] -> [B, T], [B, C] -> [B]."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad rows of ids to the same length, [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def share_of_equal(predictions: Any, references: Any) -> float:
    """Return the share of equal entries."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def share_of_right_rows(predictions: Any, labels: Any, shift: int) -> float:
    """Return the share of rows in which every labeled token is predicted.

    Args:
        predictions: the most likely token after each position, [N, T].
        labels: the labels, [N, T], with -100 where no token is learned.
        shift: 1 if the prediction for a token is at the position before it, as in decoders; 0 otherwise.
    """
    width = labels.shape[1] - shift
    aligned, expected = predictions[:, :width], labels[:, shift:]
    is_right = (aligned == expected) | (expected == IGNORE_INDEX)
    return float(np.mean(is_right.all(axis=1)))


def majority(answers: Sequence[Any]) -> float:
    """Return the share of the most frequent answer."""
    _, counts = np.unique(np.asarray(answers), return_counts=True)
    return float(counts.max() / len(answers))
