"""The task: to which package of Python's standard library does a docstring belong? The answer is the next token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softhooks.demo.corpus import Corpus, Row, split
from softhooks.errors import SoftHooksError

IGNORED = -100


@dataclass(frozen=True)
class Format:
    """The text around a docstring: `before + docstring + after`, then a space and the package.

    Attributes:
        name: for the report.
        before, after: the texts.
        instructed: whether a context begins with the instruction.
    """

    name: str
    before: str
    after: str
    instructed: bool


QUESTION = Format("question", "", "\nPackage:", instructed=True)
CODE = Format("code", '"""', '"""\nfrom', instructed=False)
"""What this model can do best without training: Python code, in which an import follows the docstring."""


@dataclass(frozen=True)
class Rows:
    """The largest number of rows of each package, in each part."""

    train: int = 150
    development: int = 8
    test: int = 44


@dataclass(frozen=True)
class Task:
    """The rows of the task, as text and as token ids.

    Attributes:
        labels: the names of the packages; each is one token when it follows a space.
        label_ids: these tokens.
        train, development, test: rows with different source files.
        max_length: longer docstrings are truncated to this many tokens.
        format: the text around a docstring.
    """

    labels: tuple[str, ...]
    label_ids: tuple[int, ...]
    train: tuple[Row, ...]
    development: tuple[Row, ...]
    test: tuple[Row, ...]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    format: Format = CODE

    @property
    def instruction(self) -> str:
        """The instruction for the baselines, and the text from which prompts are initialized."""
        return f"Name the Python package ({', '.join(self.labels)}) that this documentation belongs to."

    def question_ids(self, row: Row) -> list[int]:
        """Return the ids of a docstring and the text around it, without special tokens."""
        text = self._ids(self.format.before + row.text, truncation=True, max_length=self.max_length)
        return text + self._ids(self.format.after)

    def start_ids(self, context: Sequence[int] = ()) -> list[int]:
        """Return the ids before a row: the beginning-of-sequence token, if the tokenizer adds one, and the context."""
        special: list[int] = self.tokenizer("")["input_ids"]
        begin = special[:1] if special[:1] == [self.tokenizer.bos_token_id] else []
        return [*begin, *context]

    def label_of(self, row: Row) -> int:
        """Return the index of a row's package."""
        return self.labels.index(row.package)

    def dataset(self, rows: Sequence[Row]) -> Dataset:
        """Return rows for a Trainer: question, package, end-of-sequence token. The loss is computed on the last two."""
        return Dataset.from_list([self._training_row(row) for row in rows])

    def context(self, per_label: int, seed: int) -> list[int]:
        """Return the ids of training rows with their answers, equally many of each package, shuffled.

        They come after the instruction, if the format has one.
        """
        generator = random.Random(seed)
        examples = [
            row
            for label in self.labels
            for row in generator.sample([row for row in self.train if row.package == label], per_label)
        ]
        generator.shuffle(examples)
        ids = self._ids(f"{self.instruction}\n\n") if self.format.instructed else []
        for row in examples:
            ids += self.question_ids(row)
            ids += self._ids(f" {row.package}\n\n")
        return ids

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return ids

    def _training_row(self, row: Row) -> dict[str, Any]:
        question = self.start_ids() + self.question_ids(row)
        answer = [self.label_ids[self.label_of(row)], self.tokenizer.eos_token_id]
        return {
            "input_ids": question + answer,
            "attention_mask": [1] * (len(question) + len(answer)),
            "labels": [IGNORED] * len(question) + answer,
        }


def make_task(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int, rows_per_package: Rows
) -> Task:
    """Choose the packages whose names are one token, split the rows by source file, and sample the rows of each part.

    Args:
        rows_per_package: how many rows of each package are sampled; fewer are taken if a package has fewer.

    Raises:
        SoftHooksError: fewer than two names are one token.
    """
    ids = {label: tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in corpus.labels}
    unknown = [tokenizer.unk_token_id]
    labels = tuple(label for label in corpus.labels if len(ids[label]) == 1 and ids[label] != unknown)
    if len(labels) < 2:
        raise SoftHooksError(
            f"the tokenizer has {len(labels)} of the packages' names as one token; the demo needs at least two.",
            "Give another model with --model.",
            names=", ".join(corpus.labels),
        )
    rows = [row for row in corpus.rows if row.package in labels]
    rest, test = split(rows, 1 / 3, seed)
    train, development = split(rest, 1 / 4, seed)
    return Task(
        labels=labels,
        label_ids=tuple(ids[label][0] for label in labels),
        train=tuple(_sample(train, labels, rows_per_package.train, seed)),
        development=tuple(_sample(development, labels, rows_per_package.development, seed)),
        test=tuple(_sample(test, labels, rows_per_package.test, seed)),
        tokenizer=tokenizer,
        max_length=max_length,
    )


def _sample(rows: Sequence[Row], labels: Sequence[str], count: int, seed: int) -> list[Row]:
    """Sample at most `count` rows of each package, sorted by length, so that batches need little padding."""
    generator = random.Random(seed)
    sampled: list[Row] = []
    for label in labels:
        own = [row for row in rows if row.package == label]
        sampled += generator.sample(own, min(count, len(own)))
    return sorted(sampled, key=lambda row: len(row.text))
