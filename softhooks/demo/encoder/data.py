"""Datasets of tokenized texts for a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from softhooks.demo.corpus import Corpus, Row, split


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Any]]):
    """The training or the test rows: the arguments of the model's forward and the source file for each row."""

    rows: list[dict[str, Any]]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def labels(self) -> list[int]:
        """The class of each row."""
        return [row["labels"] for row in self.rows]


@dataclass(frozen=True)
class EncodedData:
    """The datasets, class names and tokenizer. Test rows are sorted by length, so that batches need little padding."""

    train: Rows
    test: Rows
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase


def encode(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    test_fraction: float,
    seed: int,
    limit: int | None = None,
) -> EncodedData:
    """Split the corpus and tokenize it.

    Args:
        limit: use only about this many rows, spread evenly over the corpus.
    """
    rows = corpus.rows if limit is None else corpus.rows[:: max(1, len(corpus.rows) // limit)]
    train, test = split(rows, test_fraction, seed)
    return EncodedData(
        train=_encode_rows(train, corpus.labels, tokenizer, max_length),
        test=_encode_rows(sorted(test, key=lambda row: len(row.text)), corpus.labels, tokenizer, max_length),
        labels=corpus.labels,
        tokenizer=tokenizer,
    )


def _encode_rows(
    rows: Sequence[Row], labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Rows:
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    return Rows(
        [{"input_ids": ids, "attention_mask": mask, "labels": labels.index(row.package)} for ids, mask, row in columns],
        [row.source for row in rows],
    )
