"""What a forward may bring along when slots go into its sequence; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.caches import is_recurrent
from softhooks.inject.slots.argument_values import COPIED, fill
from softhooks.inject.text_positions import OuterCall, padding_mask
from softhooks.layout.slot_map import Widened

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
            "slots in the sequence need a mask of one number a token.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
            mask=f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}",
            expected=f"[{batch}, {columns}]",
        )
    return mask


def refuse_static(cache: Any) -> None:
    """Refuse a cache of fixed size: nobody has made room for the slots in it.

    Raises:
        UnsupportedModeError: naming the cache.
    """
    if getattr(cache, "is_compileable", False) is True and not is_recurrent(cache):
        raise UnsupportedModeError(
            "slots in the sequence need a cache that grows.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
            cache=type(cache).__name__,
        )


def mask_of_text(
    call: dict[str, Any], outer: OuterCall | None, shape: tuple[int, int], device: torch.device, causal: bool
) -> Tensor:
    """The mask of a call's text, of the given shape; one that a model in between has prepared must say the same.

    Raises:
        UnsupportedModeError: it says more, or the caller gave it so.
    """
    given, flat = call.get("attention_mask"), padding_mask(call, outer)
    if given is not None and flat is None and outer is not None and outer.mask is None:
        flat = torch.ones(shape, dtype=torch.long, device=device)
    if given is not flat and flat is not None:
        refuse_other_masks(given, flat, causal)
        given = flat
    return flat_mask(given, *shape, device)


def refuse_other_masks(prepared: Any, flat: Tensor, causal: bool) -> None:
    """Refuse masks that a model around the stack has prepared, where they show more than the mask that they are made of.

    Args:
        prepared: [B, 1, T, K], bool (True: seen) or additive, or several by name.
        flat: the caller's, [B, K].

    Raises:
        UnsupportedModeError: tokens see ahead (those of an image see each other), or the masks are of another form.
    """
    for mask in prepared.values() if isinstance(prepared, dict) else [prepared]:
        if mask is None:
            continue
        if isinstance(mask, Tensor) and mask.dim() == 4 and not bool(_more(mask, flat, causal).any()):
            continue
        raise UnsupportedModeError(
            "slots in the sequence need a mask of one number a token.",
            "Use a prompt that enters as keys and values (`prompt.injection`), or rows without images.",
            mask=f"{list(mask.shape)}, in which tokens see ahead"
            if isinstance(mask, Tensor)
            else f"{type(mask).__name__}, prepared by the model around the text model",
        )


def _more(mask: Tensor, flat: Tensor, causal: bool) -> Tensor:
    """What a prepared mask shows of the call's own columns beyond those that are text, and no later ones in a decoder."""
    queries = mask.shape[-2]
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[..., -queries:]
    real = flat.to(seen.device).bool()[:, None, None, -queries:]
    if queries == 1:  # of a mask for keys alone nothing else can be told
        return seen & ~real if not causal else torch.zeros_like(seen)
    hidden = ~real | torch.ones(queries, queries, dtype=torch.bool, device=seen.device).triu(1) if causal else ~real
    return seen & hidden & real.transpose(-1, -2)


def refuse_later_text(gap: Tensor, live: Tensor, columns: int) -> None:
    """Refuse a row whose text begins in a later chunk: padding stood where the slots belong, and sliding windows see it."""
    last = torch.where(live, gap, 0).amax(-1)
    if bool((last > columns).any()):
        raise UnsupportedModeError(
            "slots need a row's first token in the first chunk of a prefill.",
            "Use a larger `prefill_chunk_size`, or a prompt that enters as keys and values (`prompt.injection`).",
            chunk=f"{columns} columns",
            row=f"{int(last.argmax())}, whose text begins later",
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
        if key.endswith("_position_ids") and not key.startswith("decoder_"):
            raise UnsupportedModeError(
                "virtual tokens among the text move its words, and positions that point at words cannot follow.",
                f"Leave `{key}` out, or disable the prompt for this call.",
                argument=f"{key} {list(value.shape)}",
            )
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
                "every per-token argument must have a value at the virtual slots.",
                f"Leave `{key}` out{other}.",
                argument=f"{key} {list(value.shape)}",
            )


def stand_by_types(call: dict[str, Any], mask: Tensor) -> bool:
    """Whether types of several numbers a token say where it stands: in which cell of a table (TAPAS), where counting begins anew.

    Then the model makes the positions itself. It counts padding too.

    Raises:
        UnsupportedModeError: a row begins with padding.
    """
    types = call.get("token_type_ids")
    if not isinstance(types, Tensor) or types.dim() != 3 or call.get("position_ids") is not None:
        return False
    if not bool(mask[:, 0].all()):
        raise UnsupportedModeError(
            "slots need rows that begin with text, in a model that makes positions of the types of tokens.",
            "Pad on the right.",
            token_type_ids=list(types.shape),
            attention_mask=f"{int((mask[:, 0] == 0).sum())} rows begin with padding",
        )
    return True


def refuse_more_columns(output: Any, text: int, wide: int) -> None:
    """Refuse a stack's states where they are not one a column: behind the text it may have put an image (LayoutLMv3)."""
    columns = last_hidden_state(output).shape[1]
    if columns not in (text, wide):
        raise UnsupportedModeError(
            "slots need a stack that returns one state for each column that it is given.",
            "Call the model with text alone.",
            given=f"{wide} columns, {wide - text} of them slots",
            returned=f"{columns} columns",
        )
