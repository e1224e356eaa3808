"""Initial embeddings: random, from the vocabulary, from labels, or given as a tensor."""

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
"""For each initial embedding, the id of its word, or None; see `PromptEncoder.start_ids`."""

COMMON_IDS = 5000
"""The number of ids to sample from, as in Lester et al."""


def random_rows(structure: ModelStructure, count: int) -> Tensor:
    """Sample embeddings from U[-0.5, 0.5], [P, H]."""
    return torch.rand(count, structure.entry.width) - 0.5


def vocabulary_ids(structure: ModelStructure, count: int, whole: bool = False) -> Tensor:
    """Sample ids from the vocabulary, [P], without replacement if the vocabulary is large enough."""
    size = structure.vocabulary if whole or count > COMMON_IDS else min(structure.vocabulary, COMMON_IDS)
    if count > size:
        return torch.randint(size, (count,))
    return torch.randperm(size)[:count]


def fill_ids(structure: ModelStructure, count: int, ids: Sequence[int]) -> list[int]:
    """Return the first P ids; if there are fewer than P, append ids sampled from the vocabulary."""
    missing = max(0, count - len(ids))
    return [*ids[:count], *(vocabulary_ids(structure, missing).tolist() if missing else [])]


def label_rows(structure: ModelStructure, count: int, labels: Sequence[str], tokenizer: Any) -> tuple[Tensor, WordIds]:
    """Return the mean embedding of each label's tokens, [P, H], and the ids of labels that consist of one token.

    If there are fewer than P labels, embeddings of ids sampled from the vocabulary are appended.
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
    """Check `init_tensor`, and scale rows copied from the embedding matrix as the embedding module scales them (Gemma)."""
    rows = tensor_rows(structure, count, tensor)
    words = ids_of_weight_rows(structure, rows)
    found = [row for row, word in enumerate(words) if word is not None]
    if found:
        embedded = embed_ids(structure, [word for word in words if word is not None])
        rows = rows.index_put((torch.tensor(found, device=rows.device),), embedded.to(rows))
    return rows


def tensor_rows(structure: ModelStructure, count: int, tensor: Any, option: str = "init_tensor") -> Tensor:
    """Check that a tensor has the shape [P, H], and convert it to fp32."""
    rows = torch.as_tensor(tensor).detach().float()
    if tuple(rows.shape) != (count, structure.entry.width):
        raise PromptMismatchError(
            f"{option} has the shape {list(rows.shape)}; it must be [num_virtual_tokens, size of the model's embeddings].",
            "Set num_virtual_tokens to the number of rows, and use embeddings that were trained on the same base model.",
            **{option: list(rows.shape)},
            expected=[count, structure.entry.width],
        )
    return rows
