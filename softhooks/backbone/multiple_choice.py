"""Multiple-choice models, which flatten rows of choices, [B, C, T], to [B * C, T] before their stack."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.layout.template import COLUMN


def choices_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return B and C of a call of the model, or (0, 1) if the text has no choices."""
    ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    for text, dimensions in ((ids, 3), (embeddings, 4)):
        if isinstance(text, Tensor) and text.dim() == dimensions:
            return text.shape[0], text.shape[1]
    return 0, 1


def for_each_choice(given: dict[str, Tensor], rows: int, choices: int) -> dict[str, Tensor]:
    """Repeat each row's extra arguments once per choice; flatten a slot column that already has choices, [B, C, S]."""
    repeated = {}
    for name, value in given.items():
        if name == COLUMN and value.dim() == 3:
            repeated[name] = value.flatten(0, 1)
        elif value.dim() and value.shape[0] == rows:
            repeated[name] = value.repeat_interleave(choices, dim=0)
        else:
            repeated[name] = value  # the size is wrong: the method raises an error that names it
    return repeated
