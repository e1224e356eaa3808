"""Initial embedding rows: random, from the vocabulary, from labels, or given as a tensor.

Rows of words are outputs of the model's embedding module, so they include its scaling (Gemma).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids, ids_of_weight_rows
from softhooks.errors import OptionError, PromptMismatchError
from softhooks.layout.tokenizing import tokenize

WordIds = Sequence[int | None] | None
"""The id of each row's word, or None; see `PromptEncoder.start_ids`."""

COMMON_IDS = 5000
"""The number of ids to sample from, as in Lester et al.: in most vocabularies the first ids are the most frequent."""


def random_rows(structure: ModelStructure, count: int) -> Tensor:
    """Sample rows from U[-0.5, 0.5]. -> [P, H]."""
    return torch.rand(count, structure.entry.width) - 0.5


def vocabulary_ids(structure: ModelStructure, count: int, whole: bool = False) -> Tensor:
    """Sample ids of the vocabulary, without replacement if the vocabulary is large enough. -> [P]."""
    size = structure.vocabulary if whole or count > COMMON_IDS else min(structure.vocabulary, COMMON_IDS)
    if count > size:
        return torch.randint(size, (count,))
    return torch.randperm(size)[:count]


def fill_ids(structure: ModelStructure, count: int, ids: Sequence[int]) -> list[int]:
    """Return the first P ids of a text, filled up with ids sampled from the vocabulary if the text is shorter."""
    missing = max(0, count - len(ids))
    return [*ids[:count], *(vocabulary_ids(structure, missing).tolist() if missing else [])]


def label_rows(structure: ModelStructure, count: int, labels: Sequence[str], tokenizer: Any) -> tuple[Tensor, WordIds]:
    """Make one row for each label, the mean of its tokens' rows; further rows are sampled from the vocabulary.

    Returns:
        the rows, [P, H], and the ids of the rows that are single words.
    """
    if isinstance(labels, str) or not labels:
        raise OptionError(f"init_labels is {labels!r}; it must be a list of at least one label.")
    ids = [tokenize(label, tokenizer, "init_labels") for label in labels]
    rows = torch.stack([embed_ids(structure, label).mean(0) for label in ids])[:count]
    words: list[int | None] = [label[0] if len(label) == 1 else None for label in ids[:count]]
    missing = count - rows.shape[0]
    if not missing:
        return rows, words
    more = vocabulary_ids(structure, missing)
    return torch.cat([rows, embed_ids(structure, more).to(rows)]), [*words, *more.tolist()]


def given_rows(structure: ModelStructure, count: int, tensor: Any) -> Tensor:
    """Check the user's rows, and replace those that equal rows of the embedding's weight by the embeddings of these tokens.

    Weight and embeddings differ if the embedding module scales its weight.
    """
    rows = tensor_rows(structure, count, tensor)
    words = ids_of_weight_rows(structure, rows)
    found = [row for row, word in enumerate(words) if word is not None]
    if found:
        embedded = embed_ids(structure, [word for word in words if word is not None])
        rows = rows.index_put((torch.tensor(found, device=rows.device),), embedded.to(rows))
    return rows


def tensor_rows(structure: ModelStructure, count: int, tensor: Any, option: str = "init_tensor") -> Tensor:
    """Check the shape of rows from another prompt."""
    rows = torch.as_tensor(tensor).detach().float()
    if tuple(rows.shape) != (count, structure.entry.width):
        raise PromptMismatchError(
            f"{option} has the shape {list(rows.shape)}; it must be [num_virtual_tokens, width of the model's embeddings].",
            "Set num_virtual_tokens to the number of rows, and use rows of the same base model.",
            **{option: list(rows.shape)},
            expected=[count, structure.entry.width],
        )
    return rows
