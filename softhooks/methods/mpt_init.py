"""Where multitask prompt tuning starts: ones, or a prompt that was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softhooks.encoder import EMBEDDINGS
from softhooks.errors import CheckpointError
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method
from softhooks.methods import initializers
from softhooks.methods.from_prompt import read_checked
from softhooks.methods.stored_fit import check_fit

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure

SEVERAL = ("shared", "left", "right")
"""The tables of a folded prompt for several tasks."""


def ones(count: int, shape: torch.Size, rank: int) -> tuple[Tensor, Tensor]:
    """Make u [K, P, r] and v [K, H, r] whose product is ones, [P, H]; further columns can leave 0, for only v's are 0."""
    left, right = (torch.zeros(count, size, rank) for size in shape)
    left[..., 1:].normal_()
    left[..., 0] = right[..., 0] = 1
    return left, right


def vectors(tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Take u [K, P, r] and v [K, H, r] of a folded prompt for several tasks."""
    length, width = tables["shared"].shape
    return tables["left"].unflatten(0, (-1, length)), tables["right"].unflatten(0, (-1, width))


def front(what: str, path: str | Path, structure: ModelStructure) -> tuple[StoredPrompt, Method]:
    """Read a saved prompt that consists of rows at the front and nothing else.

    Raises:
        CheckpointError: there is none, or it is another kind.
        PromptMismatchError: it does not fit the model.
    """
    stored, method = read_checked(path)
    place = stored.conventions.get("placement")
    if stored.heads or place != "front" or set(stored.tables) not in ({EMBEDDINGS}, set(SEVERAL)):
        raise CheckpointError(
            f"{what} must be a prompt of rows at the front of the text, without a head of its own.",
            "Give a prompt of prompt tuning or multitask prompt tuning, of a model without a new head.",
            file=stored.source,
            method=stored.kind,
            placement=place,
            heads=", ".join(stored.heads) or "none",
        )
    check_fit(stored, method, structure)
    stored.require_base(structure.entry.module, structure, override="or give its rows as a tensor")
    return stored, method


def taught(names: Sequence[str], teachers: Any, length: int, structure: ModelStructure) -> Tensor:
    """Read the teachers that were given, in the order of the tasks, [K, P, H].

    Raises:
        CheckpointError: a saved prompt holds several tasks.
    """
    each, rows = [teachers[name] for name in names] if isinstance(teachers, Mapping) else teachers, []
    for name, teacher in zip(names, each, strict=True):
        if isinstance(teacher, (str, Path)):
            stored, _ = front(f"the teacher of {name!r}", teacher, structure)
            if EMBEDDINGS not in stored.tables:
                raise CheckpointError(
                    f"{stored.source} must hold one prompt to teach {name!r}; it holds several tasks."
                )
            teacher = stored.tables[EMBEDDINGS]
        rows.append(initializers.tensor_rows(structure, length, teacher))
    return torch.stack(rows)
