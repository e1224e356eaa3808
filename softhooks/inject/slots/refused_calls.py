"""Check a call before slots are inserted into its sequence: masks, caches and per-token arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.caches import is_recurrent
from softhooks.inject.slots.argument_values import COPIED, ZERO_AT_SLOTS
from softhooks.inject.text_positions import OuterCall, padding_mask

_UNTOUCHED = {"past_key_values", "inputs_embeds", "encoder_hidden_states", "cross_attention_states"}
_WIDENED = {"input_ids", "attention_mask", "position_ids", *ZERO_AT_SLOTS}


def flat_mask(mask: Any, batch: int, columns: int, device: torch.device) -> Tensor:
    """Return the mask of the text's columns, [B, T]; all ones if no mask is given.

    Raises:
        UnsupportedModeError: the mask is already prepared for attention, as for static caches.
    """
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != columns:
        raise UnsupportedModeError(
            "the mask is already prepared for attention (as for a static cache); slots in the sequence need a mask with one "
            "value per token.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
            mask=f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}",
            expected=f"[{batch}, {columns}]",
        )
    return mask


def refuse_static(cache: Any) -> None:
    """Refuse a cache of fixed size, which has no space for the slots.

    Raises:
        UnsupportedModeError: the cache has a fixed size.
    """
    if getattr(cache, "is_compileable", False) is True and not is_recurrent(cache):
        raise UnsupportedModeError(
            f"{type(cache).__name__} has a fixed size; slots in the sequence need a cache that grows.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
        )


def mask_of_text(
    call: dict[str, Any], outer: OuterCall | None, shape: tuple[int, int], device: torch.device, causal: bool
) -> Tensor:
    """Return the mask of a call's text, one value per token, [B, T].

    If an outer model has prepared a mask for attention, the caller's own mask is used, provided that both hide the same tokens.

    Raises:
        UnsupportedModeError: the prepared mask shows more tokens, or the caller prepared it.
    """
    given, flat = call.get("attention_mask"), padding_mask(call, outer)
    if given is not None and flat is None and outer is not None and outer.mask is None:
        flat = torch.ones(shape, dtype=torch.long, device=device)
    if given is not flat and flat is not None:
        refuse_other_masks(given, flat, causal)
        given = flat
    return flat_mask(given, *shape, device)


def refuse_other_masks(prepared: Any, flat: Tensor, causal: bool) -> None:
    """Refuse masks that an outer model has prepared if they show more than the caller's mask.

    Args:
        prepared: the prepared mask, [B, 1, T, K], bool (True: seen) or additive, or several masks by name.
        flat: the caller's mask, [B, K].

    Raises:
        UnsupportedModeError: tokens see later tokens (as the tokens of an image do), or the mask has an unknown form.
    """
    for mask in prepared.values() if isinstance(prepared, dict) else [prepared]:
        if mask is None:
            continue
        if isinstance(mask, Tensor) and mask.dim() == 4 and not bool(_more(mask, flat, causal).any()):
            continue
        raise UnsupportedModeError(
            "the outer model has prepared the text model's mask; slots in the sequence need a mask with one value per token.",
            "Use a prompt that enters as keys and values (`prompt.injection`), or rows without images.",
            mask=f"{list(mask.shape)}, in which tokens see later tokens"
            if isinstance(mask, Tensor)
            else f"{type(mask).__name__}, prepared by the outer model",
        )


def _more(mask: Tensor, flat: Tensor, causal: bool) -> Tensor:
    """Mark the columns that a prepared mask must hide but shows: padding and, in a decoder, later columns. [B, 1, T, T] bool."""
    queries = mask.shape[-2]
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[..., -queries:]
    real = flat.to(seen.device).bool()[:, None, None, -queries:]
    if queries == 1:  # one row for all queries, which marks padding but not causality
        return seen & ~real if not causal else torch.zeros_like(seen)
    hidden = ~real | torch.ones(queries, queries, dtype=torch.bool, device=seen.device).triu(1) if causal else ~real
    return seen & hidden & real.transpose(-1, -2)


def refuse_later_text(gap: Tensor, live: Tensor, columns: int) -> None:
    """Refuse a row whose text starts in a later prefill chunk, because sliding windows count the padding after its slots."""
    last = torch.where(live, gap, 0).amax(-1)
    if bool((last > columns).any()):
        raise UnsupportedModeError(
            f"the text of row {int(last.argmax())} begins after the first chunk of {columns} columns; with slots, each row must "
            "have its first token in the first chunk of a prefill.",
            "Use a larger `prefill_chunk_size`, or a prompt that enters as keys and values (`prompt.injection`).",
        )


def replace_lengths(call: dict[str, Any], batch: int, columns: int) -> None:
    """Replace the `lengths` of a call's rows (XLM) by a mask, because slots change them; an existing mask takes precedence."""
    lengths = call.get("lengths")
    if not isinstance(lengths, Tensor) or lengths.shape != (batch,):
        return
    if call.get("attention_mask") is None:
        call["attention_mask"] = (torch.arange(columns, device=lengths.device) < lengths[:, None]).long()
    call["lengths"] = None


def refuse_unknown(call: dict[str, Any], stack: Stack, batch: int, columns: int) -> None:
    """Refuse per-token arguments, [B, T, ...], and per-query masks, [B, 1, T, ...], whose values at the slots are unknown.

    Raises:
        UnsupportedModeError: the call has an argument of this kind.
    """
    known = {*_UNTOUCHED, *_WIDENED, *COPIED, *stack.slot_values}
    for key, value in call.items():
        if not isinstance(value, Tensor) or key in known:
            continue
        if key.endswith("_position_ids") and not key.startswith("decoder_"):
            raise UnsupportedModeError(
                f"the call has `{key}`, whose positions refer to words of the text; slots in the sequence would move them.",
                f"Leave `{key}` out, or disable the prompt for this call.",
                argument=f"{key} {list(value.shape)}",
            )
        # An encoder's mask, [B, S], may happen to have T columns; with more dimensions it is a mask for each query.
        of_encoder = key == "encoder_attention_mask"
        per_token = value.dim() >= (3 if of_encoder else 2) and value.shape[:2] == (batch, columns)
        per_query = value.dim() >= 3 and columns in value.shape[1:-1] and value.shape[0] in (1, batch)
        if per_token or per_query:
            has_prefixes = stack.injection is not None
            other = ", or use a prompt that enters as keys and values, such as PrefixTuning" if has_prefixes else ""
            raise UnsupportedModeError(
                f"the call has `{key}`, a per-token argument whose value for virtual tokens is not known.",
                f"Leave `{key}` out{other}.",
                argument=f"{key} {list(value.shape)}",
            )


def has_positions_in_types(call: dict[str, Any], mask: Tensor) -> bool:
    """Whether positions depend on token types with several numbers, as in TAPAS, which counts the tokens of each table cell.

    In this case the model makes the positions itself, and also counts padding.

    Raises:
        UnsupportedModeError: a row starts with padding.
    """
    types = call.get("token_type_ids")
    if not isinstance(types, Tensor) or types.dim() != 3 or call.get("position_ids") is not None:
        return False
    if not bool(mask[:, 0].all()):
        raise UnsupportedModeError(
            f"{int((mask[:, 0] == 0).sum())} rows begin with padding; in a model that makes positions from token types, rows "
            "with slots must begin with text.",
            "Pad on the right.",
            token_type_ids=list(types.shape),
        )
    return True


def refuse_more_columns(output: Any, text: int, wide: int) -> None:
    """Refuse an output with more states than columns: the stack may have appended the states of an image (LayoutLMv3)."""
    columns = last_hidden_state(output).shape[1]
    if columns not in (text, wide):
        raise UnsupportedModeError(
            f"the stack returns {columns} states for {wide} columns; with slots it must return one state per column.",
            "Call the model with text only.",
            columns=f"{wide}, {wide - text} of them slots",
        )
