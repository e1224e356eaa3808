"""What a forward may bring along when slots go into its sequence; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError, explain
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


def widen_known(call: dict[str, Any], wide: Widened) -> None:
    """Give the per-token arguments whose value at a virtual token is known their widened columns, in place."""
    for name in _ZERO_AT_SLOTS:
        if isinstance(call.get(name), Tensor):
            call[name] = wide.spread(call[name], 0)


def refuse_unknown(call: dict[str, Any], batch: int, columns: int) -> None:
    """Refuse per-token arguments whose value at a slot nobody knows: [B, T, ...], and masks for each query, [B, 1, T, ...]."""
    for key, value in call.items():
        if not isinstance(value, Tensor) or key in _UNTOUCHED | _WIDENED:
            continue
        of_encoder = (
            key == "encoder_attention_mask"
        )  # [B, S], whatever S is; one with more dimensions is for each query
        per_token = value.dim() >= (3 if of_encoder else 2) and value.shape[:2] == (batch, columns)
        per_query = value.dim() >= 3 and columns in value.shape[1:-1] and value.shape[0] in (1, batch)
        if per_token or per_query:
            raise UnsupportedModeError(
                explain(
                    "every per-token argument must have a value at the virtual slots.",
                    f"Leave `{key}` out, or use a prompt that enters as keys and values, such as PrefixTuning.",
                    argument=f"{key} {list(value.shape)}",
                )
            )
