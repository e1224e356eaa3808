"""Words of the vocabulary as rows of the model's embedding, and the words that given rows are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of, read_tensor
from softhooks.compat.sharding import full
from softhooks.errors import OptionError

_SCANNED = 8192
"""How many words are compared with rows at a time."""


def embed_ids(structure: ModelStructure, ids: Tensor | Sequence[int]) -> Tensor:
    """Look ids up in the model's embedding. [P] -> [P, H]."""
    stack = structure.entry
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= structure.vocabulary):
        raise OptionError(
            "the ids of an initial text must be in the model's vocabulary.",
            "Give the tokenizer that belongs to the model.",
            ids=f"{int(ids.min())} to {int(ids.max())}",
            vocabulary=f"0 to {structure.vocabulary - 1}",
        )
    with eval_mode(stack.embedding):
        rows: Tensor = stack.embedding(ids[None].to(device_of(stack.embedding)))[0]
    return rows.float()


@torch.no_grad()
def words_among(structure: ModelStructure, rows: Tensor) -> list[int | None]:
    """The id of each row that is a word's embedding, number by number; transformers finds ids behind embeddings so too.

    Shape:
        rows [P, H] -> P ids
    """
    found: list[int | None] = [None] * len(rows)
    for start in range(0, structure.vocabulary, _SCANNED):
        ids = range(start, min(start + _SCANNED, structure.vocabulary))
        table = embed_ids(structure, list(ids))
        here = rows_equal_to(table, rows.to(table.device))
        found = [
            start + word if before is None and word is not None else before
            for before, word in zip(found, here, strict=True)
        ]
    return found


def rows_equal_to(table: Tensor, rows: Tensor) -> list[int | None]:
    """The first row of a table that each row equals. [V, H], [P, H] -> P numbers."""
    found: list[int | None] = [None] * len(rows)
    for row, word in (rows[:, None, 0] == table[None, :, 0].float()).nonzero().tolist():
        if found[row] is None and torch.equal(rows[row], table[word].float()):
            found[row] = word
    return found


@torch.no_grad()
def words_of_weight(structure: ModelStructure, rows: Tensor) -> list[int | None]:
    """The word of each row that equals, number by number, a row of the embedding's weight and is no output of the embedding.

    Such rows exist only where the embedding does more than look rows up: Gemma's multiplies them by sqrt(H).

    Shape:
        rows [P, H] -> P ids
    """
    embedding = structure.entry.embedding
    weight = full(read_tensor(embedding, "weight", embedding.weight)).detach()  # type: ignore[arg-type]
    found: list[int | None] = [None] * len(rows)
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not weight.is_floating_point() or weight.is_meta:
        return found
    known = rows_equal_to(weight, rows.to(weight.device))
    words = sorted({word for word in known if word is not None})
    if not words or torch.equal(embed_ids(structure, words), weight[words].float()):
        return found
    outputs = words_among(structure, rows)
    return [word if output is None else None for word, output in zip(known, outputs, strict=True)]
