"""Check the masks, the cache and the per-token arguments of a call before slots are inserted into its sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.compat.cache_argument import NAMES
from softhooks.errors import UnsupportedModeError
from softhooks.inject.caches import is_recurrent
from softhooks.inject.slots.argument_values import COPIED, ZERO_AT_SLOTS
from softhooks.inject.text_positions import OuterCall, padding_mask

_UNTOUCHED = {*NAMES, "inputs_embeds", "encoder_hidden_states", "cross_attention_states"}
_WIDENED = {"input_ids", "attention_mask", "position_ids", *ZERO_AT_SLOTS}


def flat_mask(mask: Any, batch: int, columns: int, device: torch.device) -> Tensor:
    """Return the mask of the text, [B, T] (ones if there is none); refuse a mask already prepared for attention."""
    if mask is None:
        return torch.ones(batch, columns, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != columns:
        raise UnsupportedModeError(
            "the attention mask is already prepared for attention (as for a static cache); slots in the sequence need a mask "
            "with one value per token.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
            mask=list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
            expected=[batch, columns],
        )
    return mask


def refuse_static(cache: Any) -> None:
    """Refuse a cache of fixed size, which has no space for the slots."""
    if getattr(cache, "is_compileable", False) is True and not is_recurrent(cache):
        raise UnsupportedModeError(
            f"{type(cache).__name__} has a fixed size; slots in the sequence need a cache that grows.",
            "Use a dynamic cache, or a prompt that enters as keys and values (`prompt.injection`).",
        )


def mask_of_text(
    call: dict[str, Any], outer: OuterCall | None, shape: tuple[int, int], device: torch.device, causal: bool
) -> Tensor:
    """Return the mask of a call's text, one value per token, [B, T].

    If the model has prepared the mask for attention, the caller's mask is returned; it must hide as much as the prepared one.
    """
    given, flat = call.get("attention_mask"), padding_mask(call, outer)
    if given is not None and flat is None and outer is not None and outer.mask is None:
        flat = torch.ones(shape, dtype=torch.long, device=device)
    if given is not flat and flat is not None:
        refuse_other_masks(given, flat, causal)
        given = flat
    return flat_mask(given, *shape, device)


def refuse_other_masks(prepared: Any, flat: Tensor, causal: bool) -> None:
    """Refuse prepared masks that allow more attention than the caller's mask, such as attention to later tokens of an image.

    Args:
        prepared: the prepared mask, [B, 1, T, K], bool (True: seen) or additive, or several masks by name.
        flat: the caller's mask, [B, K].
    """
    for mask in prepared.values() if isinstance(prepared, dict) else [prepared]:
        if mask is None:
            continue
        if isinstance(mask, Tensor) and mask.dim() == 4 and not bool(_more(mask, flat, causal).any()):
            continue
        raise UnsupportedModeError(
            "the model passes its text model a mask that shows more than `attention_mask`; slots in the sequence need a mask "
            "with one value per token.",
            "Use a prompt that enters as keys and values (`prompt.injection`), or rows without images.",
            mask=f"{list(mask.shape)}, in which tokens see later tokens"
            if isinstance(mask, Tensor)
            else type(mask).__name__,
        )


def _more(mask: Tensor, flat: Tensor, causal: bool) -> Tensor:
    """Return the keys that a prepared mask shows but should hide: padding and, in a decoder, later tokens."""
    queries = mask.shape[-2]
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[..., -queries:]
    real = flat.to(seen.device).bool()[:, None, None, -queries:]
    if queries == 1:  # one row for all queries, which marks padding but not causality
        return seen & ~real if not causal else torch.zeros_like(seen)
    hidden = ~real | torch.ones(queries, queries, dtype=torch.bool, device=seen.device).triu(1) if causal else ~real
    return seen & hidden & real.transpose(-1, -2)


def refuse_later_text(gap: Tensor, live: Tensor, columns: int) -> None:
    """Refuse a row whose text starts in a later chunk of a prefill; sliding windows would count the padding after its slots."""
    last = torch.where(live, gap, 0).amax(-1)
    if bool((last > columns).any()):
        raise UnsupportedModeError(
            f"the first chunk of the prefill, {columns} tokens, has only padding in row {int(last.argmax())}; with slots, each "
            "row must have its first token in the first chunk.",
            "Use a larger `prefill_chunk_size`, or a prompt that enters as keys and values (`prompt.injection`).",
        )


def replace_lengths(call: dict[str, Any], batch: int, columns: int) -> None:
    """Remove XLM's argument `lengths`, which would be wrong with slots; convert it to a mask unless the call has one."""
    lengths = call.get("lengths")
    if not isinstance(lengths, Tensor) or lengths.shape != (batch,):
        return
    if call.get("attention_mask") is None:
        call["attention_mask"] = (torch.arange(columns, device=lengths.device) < lengths[:, None]).long()
    call["lengths"] = None


def refuse_unknown(call: dict[str, Any], stack: Stack, batch: int, columns: int) -> None:
    """Refuse per-token arguments, [B, T, ...], and per-query masks, [B, 1, T, ...], whose values at the slots are unknown."""
    known = {*_UNTOUCHED, *_WIDENED, *COPIED, *stack.slot_values}
    for key, value in call.items():
        if not isinstance(value, Tensor) or key in known:
            continue
        refuse_moved_indices({key: value}, "slots in the sequence change these indices")
        # An encoder's mask, [B, S], may happen to have T columns; with more dimensions it is a mask for each query.
        of_encoder = key == "encoder_attention_mask"
        per_token = value.dim() >= (3 if of_encoder else 2) and value.shape[:2] == (batch, columns)
        per_query = value.dim() >= 3 and columns in value.shape[1:-1] and value.shape[0] in (1, batch)
        if per_token or per_query:
            has_prefixes = stack.injection is not None
            other = ", or use a prompt that enters as keys and values, such as PrefixTuning" if has_prefixes else ""
            raise UnsupportedModeError(
                f"the call has the per-token argument `{key}`, but its value for virtual tokens is not known.",
                f"Leave `{key}` out{other}.",
                argument=f"{key} {list(value.shape)}",
            )


def refuse_moved_indices(call: dict[str, Any], found: str) -> None:
    """Refuse arguments that refer to words by their indices (Luke's `entity_position_ids`), if a prompt moves the words."""
    for key, value in call.items():
        if isinstance(value, Tensor) and key.endswith("_position_ids") and not key.startswith("decoder_"):
            raise UnsupportedModeError(
                f"the call has `{key}`, which refers to words by their indices; {found}.",
                f"Leave `{key}` out, or disable the prompt for this call.",
                argument=f"{key} {list(value.shape)}",
            )


def has_positions_in_types(call: dict[str, Any], mask: Tensor | None, moved: bool = False) -> bool:
    """Whether the model computes positions from token types, like TAPAS, which numbers the tokens within each table cell.

    Such a model also counts padding, so rows that start with padding are refused.

    Args:
        moved: whether a prefix shifts the text's positions; it cannot shift these.
    """
    types = call.get("token_type_ids")
    if not isinstance(types, Tensor) or types.dim() != 3 or call.get("position_ids") is not None:
        return False
    if mask is not None and not bool(mask[:, 0].all()):
        raise UnsupportedModeError(
            f"{int((mask[:, 0] == 0).sum())} rows begin with padding; in a model that computes positions from token types, rows "
            "with a prompt must begin with text.",
            "Pad on the right.",
            token_type_ids=list(types.shape),
        )
    if moved:
        raise UnsupportedModeError(
            "the call has `token_type_ids` from which the model computes positions; a prefix with `shift_positions=True` cannot "
            "shift these.",
            "Use `shift_positions=False`.",
            token_type_ids=list(types.shape),
        )
    return True


def refuse_more_columns(output: Any, text: int, wide: int) -> None:
    """Refuse an output with states other than those of tokens and slots, such as the states of an image in LayoutLMv3."""
    columns = last_hidden_state(output).shape[1]
    if columns not in (text, wide):
        raise UnsupportedModeError(
            f"the model's backbone returns {columns} states for {wide} positions; with slots it must return one per position.",
            "Call the model with text only.",
            positions=f"{wide}, {wide - text} of them slots",
        )
