"""Norms, similarities and drift of a prompt's virtual tokens, from its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def table_norms(table: Tensor) -> Tensor:
    """Return the Euclidean norm of each row: [P, N] -> [P]."""
    norms: Tensor = torch.linalg.vector_norm(table.float(), dim=-1)
    return norms


def similarities(table: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the cosine similarity of each row to each row of another table, or of the same: [P, N], [Q, N] -> [P, Q]."""
    rows = functional.normalize(table.float(), dim=-1)
    return (rows @ (rows if other is None else functional.normalize(other.float(), dim=-1)).T).clamp(-1, 1)


def drift(table: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each row has moved, and its cosine similarity to its initial value: two [P, N] -> two [P]."""
    moved = torch.linalg.vector_norm(table.float() - initial.float(), dim=-1)
    return moved, functional.cosine_similarity(table.float(), initial.float(), dim=-1)


def slot_tables(tables: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the tensors with one row for each virtual token.

    Args:
        count: the number of virtual tokens, P.
    """
    return {name: table for name, table in tables.items() if table.dim() == 2 and len(table) == count}
