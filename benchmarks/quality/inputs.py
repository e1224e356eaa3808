"""Rows as inputs of the models: for encoders, the text and the index of its class; for decoders, text, question and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from benchmarks.quality.task import Row, Task, Template

IGNORED = -100


class Rows(Dataset[dict[str, Any]]):
    """Tokenized rows for a Trainer."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True)
class EncoderInputs:
    """Inputs of a sequence classifier."""

    task: Task
    tokenizer: PreTrainedTokenizerBase

    def dataset(self, rows: Sequence[Row]) -> Rows:
        """Tokenize rows for training and evaluation."""
        encoded = self.tokenizer([row.text for row in rows], truncation=True, max_length=self.task.max_length)
        return Rows(
            [
                {"input_ids": ids, "attention_mask": mask, "labels": self.task.labels.index(row.answer)}
                for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
            ]
        )

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pad on the tokenizer's side."""
        return DataCollatorWithPadding(self.tokenizer)


@dataclass(frozen=True)
class DecoderInputs:
    """Inputs of a language model, with the first template of the task.

    The loss is computed on the answer only. A generated answer ends with the end-of-sequence token; the name of a class does not,
    because classes are told apart by their first tokens.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase

    def question_part(self) -> list[int]:
        """Return the token ids of the question, with which every row ends."""
        return self._ids(self._template.question)

    def question_ids(self, row: Row) -> list[int]:
        """Return the token ids of a text, truncated to the task's length, and the question."""
        text = self._ids(self._template.before + row.text, truncation=True, max_length=self.task.max_length)
        return text + self.question_part()

    def answer_ids(self, row: Row) -> list[int]:
        """Return the token ids of an answer."""
        ids = self._ids(" " + row.answer)
        return [*ids, self._end] if self.task.generates else ids

    def first_label_ids(self) -> list[int]:
        """Return the first token of each class; raise a ValueError if two are equal."""
        first = [self._ids(" " + label)[0] for label in self.task.labels]
        if len(set(first)) < len(first):
            raise ValueError(f"two classes of {self.task.name} begin with the same token: {self.task.labels}.")
        return first

    def dataset(self, rows: Sequence[Row]) -> Rows:
        """Tokenize rows for training."""
        encoded = []
        for row in rows:
            question, answer = self.question_ids(row), self.answer_ids(row)
            encoded.append(
                {
                    "input_ids": question + answer,
                    "attention_mask": [1] * (len(question) + len(answer)),
                    "labels": [IGNORED] * len(question) + answer,
                }
            )
        return Rows(encoded)

    def document(self) -> list[int]:
        """Return the ids of the task's document."""
        return self._ids(f"{self.task.document.strip()}\n\n")

    def example(self, row: Row) -> list[int]:
        """Return the ids of a row with its answer, as an example in a context."""
        return self.question_ids(row) + self._ids(f" {row.answer}\n\n")

    def context(self, examples: Sequence[Row], limit: int | None = None) -> list[int]:
        """Return the ids of the instruction, if the template has it, and of as many examples as fit within `limit` tokens."""
        ids = self._ids(f"{self.task.instruction}\n\n") if self._template.instructed else []
        for row in examples:
            example = self.example(row)
            if limit is not None and len(ids) + len(example) > limit:
                break
            ids += example
        return ids

    @property
    def collator(self) -> DataCollatorForSeq2Seq:
        """Pad ids, mask and labels on the right."""
        return DataCollatorForSeq2Seq(self.tokenizer)

    @property
    def _template(self) -> Template:
        return self.task.templates[0]

    @property
    def _end(self) -> int:
        end: int = self.tokenizer.eos_token_id
        return end

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids
