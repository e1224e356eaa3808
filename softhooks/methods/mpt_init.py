"""Where multitask prompt tuning starts: ones, or a prompt that was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softhooks.encoder import EMBEDDINGS
from softhooks.errors import CheckpointError
from softhooks.methods import initializers

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure
    from softhooks.formats.stored import Stored

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


def front(what: str, path: str | Path, structure: ModelStructure) -> Stored:
    """Read a saved prompt that consists of rows at the front and nothing else.

    Raises:
        CheckpointError: there is none, or it is another kind.
        PromptMismatchError: it does not fit the model.
    """
    from softhooks.base_model.check import require_base
    from softhooks.formats.find import find

    stored = find(path)
    place = stored.conventions.get("placement")
    if stored.heads or place != "front" or set(stored.tables) not in ({EMBEDDINGS}, set(SEVERAL)):
        raise CheckpointError(
            f"{what} must be a prompt of rows at the front of the text, without a head of its own.",
            "Give a prompt of prompt tuning or multitask prompt tuning, of a model without a new head.",
            file=stored.source,
            method=stored.method.kind,
            placement=place,
            heads=", ".join(stored.heads) or "none",
        )
    stored.check_fit(structure)
    require_base(stored, structure.entry.module, structure, override="or give its rows as a tensor")
    return stored


def taught(names: Sequence[str], teachers: Any, length: int, structure: ModelStructure) -> Tensor:
    """Read the teachers that were given, in the order of the tasks, [K, P, H].

    Raises:
        CheckpointError: a saved prompt holds several tasks.
    """
    each, rows = [teachers[name] for name in names] if isinstance(teachers, Mapping) else teachers, []
    for name, teacher in zip(names, each, strict=True):
        if isinstance(teacher, (str, Path)):
            stored = front(f"the teacher of {name!r}", teacher, structure)
            if EMBEDDINGS not in stored.tables:
                raise CheckpointError(
                    f"{stored.source} must hold one prompt to teach {name!r}; it holds several tasks."
                )
            teacher = stored.tables[EMBEDDINGS]
        rows.append(initializers.tensor_rows(structure, length, teacher))
    return torch.stack(rows)
