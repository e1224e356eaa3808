"""Look up the embeddings of token ids, and find the token ids of embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of, read_tensor
from softhooks.compat.sharding import full
from softhooks.errors import OptionError, UnsupportedMethodError

_CHUNK = 8192
"""The number of tokens whose embeddings are compared at a time."""


def embed_ids(structure: ModelStructure, ids: Tensor | Sequence[int]) -> Tensor:
    """Return the embeddings of token ids, in fp32. [P] -> [P, H]."""
    stack = structure.entry
    if not structure.embeds_tokens:
        raise UnsupportedMethodError(
            f"{type(stack.module).__name__} takes `{stack.features}` instead of token ids, so a prompt cannot start from a text.",
            "Use PrefixTuning, PTuningV2 or LlamaAdapter.",
        )
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= structure.vocabulary):
        raise OptionError(
            "the initial text has ids that are not in the model's vocabulary.",
            "Pass the tokenizer that belongs to the model.",
            ids=f"{int(ids.min())} to {int(ids.max())}",
            vocabulary=f"0 to {structure.vocabulary - 1}",
        )
    with eval_mode(stack.embedding):
        rows: Tensor = stack.embedding(ids[None].to(device_of(stack.embedding)))[0]
    return rows.float()


@torch.no_grad()
def ids_of_rows(structure: ModelStructure, rows: Tensor) -> list[int | None]:
    """For each row, find the first token id whose embedding equals it exactly, or None. [P, H] -> P ids."""
    found: list[int | None] = [None] * len(rows)
    for start in range(0, structure.vocabulary, _CHUNK):
        ids = range(start, min(start + _CHUNK, structure.vocabulary))
        table = embed_ids(structure, list(ids))
        for row, index in enumerate(_equal_rows(table, rows.to(table.device))):
            if found[row] is None and index is not None:
                found[row] = start + index
    return found


def _equal_rows(table: Tensor, rows: Tensor) -> list[int | None]:
    """For each row, find the index of the first equal row of `table`, or None. [V, H], [P, H] -> P indices."""
    found: list[int | None] = [None] * len(rows)
    for row, index in (rows[:, None, 0] == table[None, :, 0].float()).nonzero().tolist():
        if found[row] is None and torch.equal(rows[row], table[index].float()):
            found[row] = index
    return found


@torch.no_grad()
def ids_of_weight_rows(structure: ModelStructure, rows: Tensor) -> list[int | None]:
    """For each row, find the id whose row of `embedding.weight` equals it: users may pass weights instead of embeddings.

    The two differ if the embedding does more than look up rows: Gemma multiplies them by sqrt(H). The id is None if no row of
    the weight equals the given row, or if an embedding equals it too. [P, H] -> P ids.
    """
    embedding = structure.entry.embedding
    weight = full(read_tensor(embedding, "weight", embedding.weight)).detach()  # type: ignore[arg-type]
    none: list[int | None] = [None] * len(rows)
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not weight.is_floating_point() or weight.is_meta:
        return none
    ids = _equal_rows(weight, rows.to(weight.device))
    known = sorted({id_ for id_ in ids if id_ is not None})
    if not known or torch.equal(embed_ids(structure, known), weight[known].float()):
        return none
    outputs = ids_of_rows(structure, rows)
    return [id_ if output is None else None for id_, output in zip(ids, outputs, strict=True)]
