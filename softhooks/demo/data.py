"""The corpus as a Trainer wants it: token ids and labels, and a collator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from softhooks.demo.corpus import Corpus, Row, split


class EncodedRow(TypedDict):
    """One row of a dataset, named as the model's forward names its arguments."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: int


@dataclass(frozen=True)
class EncodedData:
    """The two sides of the split, ready for a Trainer.

    Attributes:
        train: the training rows.
        test: the test rows, the shortest first, so that a batch needs little padding.
        train_sources: the source file of each training row, for cross-validation by file.
        labels: the classes' names.
        tokenizer: what encoded the text.
    """

    train: list[EncodedRow]
    test: list[EncodedRow]
    train_sources: list[str]
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def collate(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Pad rows to one batch."""
        batch: dict[str, Tensor] = dict(DataCollatorWithPadding(self.tokenizer)(list(rows)))
        return batch


def encode(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    test_fraction: float,
    seed: int,
    limit: int | None = None,
) -> EncodedData:
    """Split the corpus and turn its text into token ids.

    Args:
        corpus: the text.
        tokenizer: the model's own.
        max_length: longer texts are cut.
        test_fraction: the test rows' share.
        seed: of the split.
        limit: keep about so many rows in all, spread over the corpus; `None` keeps all.
    """
    rows = corpus.rows if limit is None else corpus.rows[:: max(1, len(corpus.rows) // limit)]
    train, test = split(rows, test_fraction, seed)
    return EncodedData(
        train=_encode_rows(train, corpus.labels, tokenizer, max_length),
        test=sorted(_encode_rows(test, corpus.labels, tokenizer, max_length), key=lambda row: len(row["input_ids"])),
        train_sources=[row.source for row in train],
        labels=corpus.labels,
        tokenizer=tokenizer,
    )


def _encode_rows(
    rows: Sequence[Row], labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedRow]:
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    return [
        EncodedRow(input_ids=ids, attention_mask=mask, labels=labels.index(row.package))
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]
