"""The initial values of P*, u, v and the teachers in multitask prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import CheckpointError
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods import initializers
from softhooks.methods.from_prompt import read_checked
from softhooks.methods.stored_method import check_fit
from softhooks.prompt_encoder import EMBEDDINGS

SEVERAL = ("shared", "left", "right")
"""The names of the saved P*, u and v if there are several tasks."""


def ones(count: int, shape: torch.Size, rank: int) -> tuple[Tensor, Tensor]:
    """Return u [K, P, r] and v [K, H, r] such that every u v^T is a matrix of ones, [P, H]."""
    left, right = (torch.zeros(count, size, rank) for size in shape)
    left[..., 1:].normal_()  # v is 0 in these columns; if u were 0 too, v would get no gradient
    left[..., 0] = right[..., 0] = 1
    return left, right


def vectors(tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Split the saved u and v by task, [K, P, r] and [K, H, r]."""
    length, width = tables["shared"].shape
    return tables["left"].unflatten(0, (-1, length)), tables["right"].unflatten(0, (-1, width))


def read_front_prompt(name: str, path: str | Path, structure: ModelStructure) -> tuple[StoredPrompt, Method]:
    """Read a saved prompt, which must consist of embeddings before the text, without a head; errors begin with `name`."""
    stored, method = read_checked(path)
    place = stored.conventions.get("placement")
    if stored.heads or place != "front" or set(stored.tables) not in ({EMBEDDINGS}, set(SEVERAL)):
        raise CheckpointError(
            f"{name} is a {stored.kind} prompt; it must consist of embeddings before the text, saved without a head.",
            "Use a prompt_tuning or multitask_prompt_tuning prompt that was trained on a model without a new head.",
            file=stored.source,
            method=stored.kind,
            placement=place,
            heads=", ".join(stored.heads) or "none",
        )
    check_fit(stored, method, structure)
    stored.require_base(structure.entry.module, structure, override="or pass its embeddings as a tensor")
    return stored, method


def read_teachers(names: Sequence[str], teachers: Any, length: int, structure: ModelStructure) -> Tensor:
    """Read the teachers in the order of the tasks, [K, P, H]."""
    each, rows = [teachers[name] for name in names] if isinstance(teachers, Mapping) else teachers, []
    for name, teacher in zip(names, each, strict=True):
        if isinstance(teacher, (str, Path)):
            stored, _ = read_front_prompt(f"the teacher of {name!r}", teacher, structure)
            if EMBEDDINGS not in stored.tables:
                raise CheckpointError(
                    f"the teacher of {name!r} ({stored.source}) has several tasks; it must have a single task."
                )
            teacher = stored.tables[EMBEDDINGS]
        rows.append(initializers.tensor_rows(structure, length, teacher))
    return torch.stack(rows)
