"""The data: MetaMathQA to train on, GSM8K to evaluate on, and texts of Wikipedia to see what the model forgets.

All three are from the Hub, or from JSON lines in a directory: `metamath.jsonl` (query, response), `gsm8k-train.jsonl` and
`gsm8k-test.jsonl` (question, answer), and `wiki.jsonl` (text).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.metamath.settings import ExperimentError, Settings

METAMATH, GSM8K, WIKIPEDIA = "meta-math/MetaMathQA", "openai/gsm8k", "HuggingFaceFW/finewiki"
LONGEST_TEXT = 1300
"""Longer training texts, in characters of query and response, are left out. This does not depend on the tokenizer."""
VALIDATION_ROWS = 50
WIKIPEDIA_ROWS = 100
BATCHES_IN_BUCKET = 20
IGNORED = -100


class Problem(NamedTuple):
    """A question and its solution."""

    query: str
    response: str


@dataclass(frozen=True)
class Data:
    """The rows of a run.

    Attributes:
        train: a dataset with the columns `query` and `response`.
        validation, test: problems of GSM8K, from its training and its test rows.
        wikipedia: texts.
    """

    train: datasets.Dataset
    validation: list[Problem]
    test: list[Problem]
    wikipedia: list[str]


def load(directory: Path | None) -> Data:
    """Load the rows from the Hub, or from a directory."""
    if directory is None:
        metamath = datasets.load_dataset(METAMATH)["train"]
        gsm8k = datasets.load_dataset(GSM8K, "main")
        wikipedia = datasets.load_dataset(WIKIPEDIA, split="train", streaming=True).take(WIKIPEDIA_ROWS)
        return _data(metamath, gsm8k["train"], gsm8k["test"], [row["text"] for row in wikipedia])
    metamath = datasets.Dataset.from_list(_lines(directory, "metamath", ("query", "response")))
    train, test = (_lines(directory, f"gsm8k-{part}", ("question", "answer")) for part in ("train", "test"))
    return _data(metamath, train, test, [row["text"] for row in _lines(directory, "wiki", ("text",))])


def _data(metamath: datasets.Dataset, train: Any, test: Any, wikipedia: list[str]) -> Data:
    rows = range(len(metamath))
    lengths = [len(q) + 1 + len(r) for q, r in zip(metamath["query"], metamath["response"], strict=True)]
    kept = metamath.select([row for row in rows if lengths[row] <= LONGEST_TEXT])
    chosen = np.random.RandomState(0).permutation(len(train))[:VALIDATION_ROWS]
    return Data(
        kept.select_columns(["query", "response"]),
        [Problem(row["question"], row["answer"]) for row in (train[int(index)] for index in chosen)],
        [Problem(row["question"], row["answer"]) for row in test],
        wikipedia,
    )


def _lines(directory: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    path = directory / f"{name}.jsonl"
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; write one JSON object per line, with {', '.join(columns)}.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not all(set(columns) <= set(row) for row in rows):
        raise ExperimentError(f"{path} must have at least one row, and {', '.join(columns)} in every row.")
    return rows


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Tokenize texts, with special tokens, and cut off what is too long."""
    return [ids[:longest] for ids in tokenizer(list(texts))["input_ids"]]


def question_of(settings: Settings, query: str) -> str:
    """Return the text before the answer."""
    return settings.query_template.format(query=query)


def training_batches(
    train: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[list[list[int]]]:
    """Yield the ids of each batch, in the order of the rows; only rows of the same 20 batches are sorted by length.

    Rows of similar length need little padding. The longest come first, so that a lack of memory shows early.
    """
    size = settings.batch_size * BATCHES_IN_BUCKET
    for first in range(0, len(train), size):
        rows = train[first : first + size]
        texts = [question_of(settings, q) + r for q, r in zip(rows["query"], rows["response"], strict=True)]
        bucket = encode(tokenizer, texts, settings.max_seq_length)
        # argsort, as in PEFT's comparison, whose order of rows of the same length is not that of `sorted`
        bucket = [bucket[row] for row in torch.tensor([len(ids) for ids in bucket]).argsort(descending=True)]
        for start in range(0, len(bucket), settings.batch_size):
            yield bucket[start : start + settings.batch_size]


def pad(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """Pad rows of ids to the length of the longest."""
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side=side)
    return {name: padded[name] for name in ("input_ids", "attention_mask")}


def training_batch(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> dict[str, Any]:
    """Pad a batch and add labels.

    All tokens are labels, and so is the first padding token, which is EOS, so that the model learns to stop. Later padding is
    ignored. The longest row has no padding and thus no EOS. The loss is divided by the number of tokens that are not padding.
    """
    batch: dict[str, Any] = dict(pad(tokenizer, rows, "right"))
    labels = batch["input_ids"].clone()
    for label, row in zip(labels, rows, strict=True):
        label[len(row) + 1 :] = IGNORED
    return {**batch, "labels": labels, "num_items_in_batch": int(batch["attention_mask"].sum())}
