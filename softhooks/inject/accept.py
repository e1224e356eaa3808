"""What a forward may bring along when slots go into its sequence; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.anatomy import Stack, first_state
from softhooks.errors import UnsupportedModeError, explain
from softhooks.inject.fills import COPIED, fill
from softhooks.inject.provenance import is_recurrent
from softhooks.inject.widened import Widened
from softhooks.layout.places import text_positions

_UNTOUCHED = {"past_key_values", "inputs_embeds", "encoder_hidden_states", "cross_attention_states"}
_ZERO_AT_SLOTS = ("token_type_ids", "visual_pos_masks", "image_embeds_position_mask")
"""Per-token arguments that are 0 at a virtual token: the first type of token, and no part of an image."""
_WIDENED = {"input_ids", "attention_mask", "position_ids", *_ZERO_AT_SLOTS}


def flat_mask(mask: Any, batch: int, columns: int, device: torch.device) -> Tensor:
    """The mask of the text's columns, [B, T]; all ones where none is given.

    Raises:
        UnsupportedModeError: the mask was prepared for attention already, as static caches do.
    """
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != columns:
        raise UnsupportedModeError(
            explain(
                "slots in the sequence need a mask of one number a token.",
                "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
                mask=f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}",
                expected=f"[{batch}, {columns}]",
            )
        )
    return mask


def refuse_static(cache: Any) -> None:
    """Refuse a cache of fixed size: nobody has made room for the slots in it.

    Raises:
        UnsupportedModeError: naming the cache.
    """
    if getattr(cache, "is_compileable", False) is True and not is_recurrent(cache):
        raise UnsupportedModeError(
            explain(
                "slots in the sequence need a cache that grows.",
                "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
                cache=type(cache).__name__,
            )
        )


def refuse_moved_positions(positions: Any, mask: Tensor) -> None:
    """Refuse positions that are not the text's own count: packed documents would not each see the prompt."""
    if positions is None:
        return
    expected = text_positions(mask)
    given = positions.expand_as(expected) if positions.dim() == 2 else None
    if given is None or not torch.equal(given[mask.bool()], expected[mask.bool()]):
        raise UnsupportedModeError(
            explain(
                "slots in the sequence stand once in every row, so positions must count each row's text from 0.",
                "Unpack the documents into rows of their own, or use a prompt that enters as keys and values.",
                position_ids=f"{list(positions.shape)}, not the count of the attention mask",
            )
        )


def mask_of_lengths(call: dict[str, Any], batch: int, columns: int) -> None:
    """Say by a mask what a call says by the lengths of its rows (XLM), which slots change; a mask goes before them."""
    lengths = call.get("lengths")
    if not isinstance(lengths, Tensor) or lengths.shape != (batch,):
        return
    if call.get("attention_mask") is None:
        call["attention_mask"] = (torch.arange(columns, device=lengths.device) < lengths[:, None]).long()
    call["lengths"] = None


def widen_known(call: dict[str, Any], wide: Widened, fills: dict[str, int]) -> None:
    """Give the per-token arguments whose value at a virtual token is known their widened columns, in place.

    Args:
        fills: the values that were found for this stack.
    """
    fill(call, wide, {**dict.fromkeys(_ZERO_AT_SLOTS, 0), **fills})


def refuse_unknown(call: dict[str, Any], stack: Stack, batch: int, columns: int) -> None:
    """Refuse per-token arguments whose value at a slot nobody knows: [B, T, ...], and masks for each query, [B, 1, T, ...]."""
    known = {*_UNTOUCHED, *_WIDENED, *COPIED, *stack.fills}
    for key, value in call.items():
        if not isinstance(value, Tensor) or key in known:
            continue
        of_encoder = (
            key == "encoder_attention_mask"
        )  # [B, S], whatever S is; one with more dimensions is for each query
        per_token = value.dim() >= (3 if of_encoder else 2) and value.shape[:2] == (batch, columns)
        per_query = value.dim() >= 3 and columns in value.shape[1:-1] and value.shape[0] in (1, batch)
        if per_token or per_query:
            other = (
                ""
                if stack.through is None
                else ", or use a prompt that enters as keys and values, such as PrefixTuning"
            )
            raise UnsupportedModeError(
                explain(
                    "every per-token argument must have a value at the virtual slots.",
                    f"Leave `{key}` out{other}.",
                    argument=f"{key} {list(value.shape)}",
                )
            )


def refuse_more_columns(output: Any, text: int, wide: int) -> None:
    """Refuse a stack's states where they are not one a column: behind the text it may have put an image (LayoutLMv3)."""
    columns = first_state(output).shape[1]
    if columns not in (text, wide):
        raise UnsupportedModeError(
            explain(
                "slots need a stack that returns one state for each column that it is given.",
                "Call the model with text alone.",
                given=f"{wide} columns, {wide - text} of them slots",
                returned=f"{columns} columns",
            )
        )
