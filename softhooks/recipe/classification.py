"""Encode rows for a classifier with a new head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from softhooks.errors import OptionError
from softhooks.recipe.encoded import Encoded, best_ids, majority, share_of_equal
from softhooks.recipe.options import TrainOptions
from softhooks.recipe.table import Table

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_CLASSES = 1000


def encode(table: Table, tokenizer: PreTrainedTokenizerBase, options: TrainOptions) -> Encoded:
    """Tokenize the texts, and number the labels in alphabetical order, or in the order of a `ClassLabel`.

    Raises:
        OptionError: there are too few or too many classes, or a validation row has a label that no training row has.
    """
    answers = [[table.answer(rows, value) for value in rows[table.label]] for rows in table.parts()]
    labels = _labels(table, answers[0])
    unknown = sorted({answer for part in answers for answer in part} - set(labels))
    if unknown:
        raise OptionError(
            f"{len(unknown)} labels occur only in the validation rows, so the head has no output for them.",
            "Add training rows with these labels, or set another --seed or --validation.",
            labels=", ".join(unknown[:8]),
        )
    number = {label: index for index, label in enumerate(labels)}
    parts, truncated = [], 0
    for rows, own in zip(table.parts(), answers, strict=True):
        encoded, cut = _encode(rows, [number[answer] for answer in own], table, tokenizer, options)
        parts.append(encoded)
        truncated += cut

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch: Any = tokenizer.pad(inputs, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    return Encoded(
        train=parts[0],
        validation=parts[1] if len(parts) > 1 else None,
        collate=collate,
        metric="accuracy",
        compute_metrics=_accuracy,
        keep=best_ids,
        majority=majority(answers[1]) if len(answers) > 1 else None,
        labels=labels,
        truncated=truncated,
    )


def _labels(table: Table, answers: list[str]) -> tuple[str, ...]:
    """Return the names of the classes: those of the label column, or else its sorted values in the training rows."""
    names = getattr(table.train.features[table.label], "names", None)
    labels = tuple(names) if names is not None else tuple(sorted(set(answers)))
    if not 2 <= len(labels) <= _MOST_CLASSES:
        raise OptionError(
            f"the training rows have {len(labels)} different labels; classification needs 2 to {_MOST_CLASSES}.",
            "Name the column of the classes with --label, or leave out `--task classification` to train a language model.",
            label=table.label,
            first=", ".join(labels[:5]),
        )
    return labels


def _encode(
    rows: Dataset, labels: list[int], table: Table, tokenizer: PreTrainedTokenizerBase, options: TrainOptions
) -> tuple[Dataset, int]:
    """Return the encoded rows, and how many were truncated."""
    from datasets import Dataset

    texts = [table.render(row) for row in rows]
    encoded: Any = tokenizer(texts)
    cut = sum(len(ids) > options.max_length for ids in encoded["input_ids"])
    if cut:
        encoded = tokenizer(texts, truncation=True, max_length=options.max_length)
    return Dataset.from_dict({**encoded, "labels": labels}), cut


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": share_of_equal(evaluated.predictions, evaluated.label_ids)}
