"""Where prompts start: random numbers, words of the vocabulary, a text, labels, the keys and values of a text.

Rows are what the model's own embedding module returns, so that a scale inside it (Gemma) is part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids, words_of_weight
from softhooks.errors import OptionError, PromptMismatchError
from softhooks.layout.tokenizing import tokenize

Words = Sequence[int | None] | None
"""The id of the word that each row is, if it is one; see `PromptEncoder.start_ids`."""

COMMON_IDS = 5000
"""The first ids of a vocabulary are its most frequent words; Lester et al. draw from these."""


def random_rows(structure: ModelStructure, count: int) -> Tensor:
    """Draw from U[-0.5, 0.5]. -> [P, H]."""
    return torch.rand(count, structure.entry.width) - 0.5


def vocabulary_ids(structure: ModelStructure, count: int, whole: bool = False) -> Tensor:
    """Draw ids of the vocabulary, without replacement where it is large enough. -> [P]."""
    size = structure.vocabulary if whole or count > COMMON_IDS else min(structure.vocabulary, COMMON_IDS)
    if count > size:
        return torch.randint(size, (count,))
    return torch.randperm(size)[:count]


def filled(structure: ModelStructure, count: int, ids: Sequence[int]) -> list[int]:
    """Take P ids of a text; what it lacks comes from the vocabulary."""
    known = list(ids[:count])
    missing = count - len(known)
    return known + (vocabulary_ids(structure, missing).tolist() if missing else [])


def label_rows(structure: ModelStructure, count: int, labels: Sequence[str], tokenizer: Any) -> tuple[Tensor, Words]:
    """Take one row a label, the mean of its tokens' rows; what is missing comes from the vocabulary.

    Returns:
        the rows, [P, H], and the id of each that is one word.
    """
    if isinstance(labels, str) or not labels:
        raise OptionError(f"init_labels must be a list of one label or more; it is {labels!r}.")
    ids = [tokenize(label, tokenizer, "init_labels") for label in labels]
    rows = torch.stack([embed_ids(structure, label).mean(0) for label in ids])[:count]
    words: list[int | None] = [label[0] if len(label) == 1 else None for label in ids[:count]]
    missing = count - rows.shape[0]
    if not missing:
        return rows, words
    more = vocabulary_ids(structure, missing)
    return torch.cat([rows, embed_ids(structure, more).to(rows)]), [*words, *more.tolist()]


def given_rows(structure: ModelStructure, count: int, tensor: Any) -> Tensor:
    """Take the rows that a user gives; those of the embedding's weight mean their words, also where a scale follows.

    Raises:
        PromptMismatchError: the shape is not [P, H].
    """
    rows = tensor_rows(structure, count, tensor)
    words = words_of_weight(structure, rows)
    found = [row for row, word in enumerate(words) if word is not None]
    if found:
        embedded = embed_ids(structure, [word for word in words if word is not None])
        rows = rows.index_put((torch.tensor(found, device=rows.device),), embedded.to(rows))
    return rows


def tensor_rows(structure: ModelStructure, count: int, tensor: Any, option: str = "init_tensor") -> Tensor:
    """Take another prompt's rows.

    Raises:
        PromptMismatchError: its shape is not [P, H].
    """
    rows = torch.as_tensor(tensor).detach().float()
    if tuple(rows.shape) != (count, structure.entry.width):
        raise PromptMismatchError(
            "the initial rows must be one a virtual token, as wide as the model's embeddings.",
            "Set num_virtual_tokens to their number, and take them from the same base model.",
            **{option: list(rows.shape)},
            expected=[count, structure.entry.width],
        )
    return rows
