"""Datasets for a Trainer from the corpus: token ids, labels and a collator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from softhooks.demo.corpus import Corpus, Row, split


class EncodedRow(TypedDict):
    """A row of a dataset, with arguments of the model's forward as keys."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: int


class Rows(Dataset[EncodedRow]):
    """The dataset of one part of the split.

    Args:
        rows: the rows.
        sources: the source file of each row.
    """

    def __init__(self, rows: Sequence[EncodedRow], sources: Sequence[str]) -> None:
        self.rows = list(rows)
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]

    @property
    def labels(self) -> list[int]:
        """The class of each row."""
        return [row["labels"] for row in self.rows]


@dataclass(frozen=True)
class EncodedData:
    """Both parts of the split, as datasets.

    Attributes:
        train: the training rows.
        test: the test rows, sorted by length, so that batches need little padding.
        labels: the names of the classes.
        tokenizer: the tokenizer of the rows.
    """

    train: Rows
    test: Rows
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def collate(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Pad rows into a batch."""
        batch: dict[str, Tensor] = dict(DataCollatorWithPadding(self.tokenizer)([dict(row) for row in rows]))
        return batch


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
        corpus: the texts.
        tokenizer: the tokenizer of the model.
        max_length: longer texts are truncated to this many tokens.
        test_fraction: the share of test rows.
        seed: the seed of the split.
        limit: the approximate number of rows to keep, spread over the corpus, or None to keep all rows.
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
    return Rows(
        [
            EncodedRow(input_ids=ids, attention_mask=mask, labels=labels.index(row.package))
            for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
        ],
        [row.source for row in rows],
    )
