"""Rows with several choices, [B, C, T], which multiple-choice models flatten to [B * C, T] before their stack.

Users give a prompt, a task or a context for each row; it applies to all choices of the row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.layout.template import COLUMN


def choices_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of rows and of choices in a call of the model, or (0, 1) if the text has no choices."""
    for text, dimensions in (
        (kwargs.get("input_ids", args[0] if args else None), 3),
        (kwargs.get("inputs_embeds"), 4),
    ):
        if isinstance(text, Tensor) and text.dim() == dimensions:
            return text.shape[0], text.shape[1]
    return 0, 1


def for_each_choice(given: dict[str, Tensor], rows: int, choices: int) -> dict[str, Tensor]:
    """Repeat each row's extra arguments once per choice. A slot column with an axis for choices, [B, C, S], is flattened."""
    repeated = {}
    for name, value in given.items():
        if name == COLUMN and value.dim() == 3:
            repeated[name] = value.flatten(0, 1)
        elif value.dim() and value.shape[0] == rows:
            repeated[name] = value.repeat_interleave(choices, dim=0)
        else:
            repeated[name] = value  # the size is wrong: the method raises an error that names it
    return repeated
