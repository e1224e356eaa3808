"""Rows of choices, [B, C, T], as models for multiple choice take them and flatten to [B * C, T] before their stack.

A prompt, a task or a context is named for a row; each choice of the row meets it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.layout.template import COLUMN


def choices_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and choices of a call of the model; (0, 1) where its text has no choices."""
    for text, dimensions in (
        (kwargs.get("input_ids", args[0] if args else None), 3),
        (kwargs.get("inputs_embeds"), 4),
    ):
        if isinstance(text, Tensor) and text.dim() == dimensions:
            return text.shape[0], text.shape[1]
    return 0, 1


def for_each_choice(given: dict[str, Tensor], rows: int, choices: int) -> dict[str, Tensor]:
    """Give each choice of a row the row's extra arguments; where slots stand may be told for each choice, [B, C, S]."""
    spread = {}
    for name, value in given.items():
        if name == COLUMN and value.dim() == 3:
            spread[name] = value.flatten(0, 1)
        elif value.dim() and value.shape[0] == rows:
            spread[name] = value.repeat_interleave(choices, dim=0)
        else:
            spread[name] = value  # the method says what is wrong with it
    return spread
