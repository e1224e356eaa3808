"""Where the text of a forward stands: what its caller says, what the mask says, and what a model in between has made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.errors import PromptNotReachedError
from softhooks.layout.layout import text_positions

BROUGHT = ("position_ids", "attention_mask", "decoder_position_ids", "decoder_attention_mask")
"""The arguments of the model that are kept, while its forward is under way, as the caller gave them."""


@dataclass(frozen=True)
class Outer:
    """What the call of the model brought for a stack inside it, as the caller gave it.

    A model around a text model may count columns and hand these on as positions, and hand on masks that are prepared for
    attention already.

    Attributes:
        positions: the `position_ids`.
        mask: the `attention_mask`.
    """

    positions: Any
    mask: Any


def text_shape(call: dict[str, Any]) -> tuple[int, int]:
    """Batch and columns of the text in a call.

    Raises:
        PromptNotReachedError: the call has neither ids nor embeddings.
    """
    text = _text(call)
    if not isinstance(text, Tensor):
        raise PromptNotReachedError(
            "a prompt needs `input_ids` or `inputs_embeds` in the call of the model's backbone."
        )
    return text.shape[0], text.shape[1]


def _text(call: dict[str, Any]) -> Any:
    return call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]


def past_of(call: dict[str, Any]) -> Any:
    """How many columns of the text are in the cache."""
    cache = call.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def padding_mask(call: dict[str, Any], outer: Outer | None) -> Tensor | None:
    """The mask of one number a column, [B, past + T], also where the stack was handed one made of it; None: there is none."""
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    given = None if mask is None or outer is None else outer.mask
    if not isinstance(given, Tensor) or given.dim() != 2:
        return None
    batch, columns = text_shape(call)
    return given if given.shape[0] == batch and given.shape[1] >= columns else None


def given_positions(stack: Stack, call: dict[str, Any], outer: Outer | None) -> Tensor | None:
    """The positions that a call brings, in the stack's own numbering; None if it brings none.

    Columns that a model in between has counted, padding and all, are counted again by the mask.
    """
    given = call.get("position_ids")
    if given is None or outer is None or outer.positions is not None:
        return None if given is None else torch.as_tensor(given)
    mask = padding_mask(call, outer)
    if mask is None:
        return torch.as_tensor(given)
    _, columns = text_shape(call)
    counted = torch.arange(columns, device=given.device) + past_of(call) + stack.positions.start
    if given.shape[-1] != columns or not bool((given == counted).all()):
        return torch.as_tensor(given)
    own = text_positions(mask.to(given.device))[:, -columns:] + stack.positions.start
    return own.expand(*given.shape[:-2], -1, -1) if given.dim() > 2 else own


def positions_in_text(stack: Stack, call: dict[str, Any], outer: Outer | None) -> Tensor:
    """Where the text stands, counted from 0 in each row (or document), [B or 1, T]; with several axes (M-RoPE), [A, B, T]."""
    given = given_positions(stack, call, outer)
    return counted_positions(call, outer) if given is None else given - stack.positions.start


def counted_positions(call: dict[str, Any], outer: Outer | None) -> Tensor:
    """Where the text stands by its mask, or by its columns where it has none, from 0. -> [B or 1, T]."""
    _, columns = text_shape(call)
    mask = padding_mask(call, outer)
    if mask is not None:
        return text_positions(mask)[:, -columns:]
    counted: Tensor = torch.arange(columns, device=_text(call).device) + past_of(call)
    return counted[None]


def order_in_text(positions: Tensor | None, call: dict[str, Any], outer: Outer | None) -> Tensor | None:
    """Where tokens stand among those before them; positions of several axes (M-RoPE) say where they stand in an image."""
    if positions is None or positions.dim() < 3:
        return positions
    return (
        positions[0] if positions.shape[0] == 4 else counted_positions(call, outer)
    )  # of four, the text's own come first
