"""Find the positions of the text in a call, and check that prompt and text fit into the model's maximum length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.max_positions import warn_beyond
from softhooks.backbone.stack import Stack
from softhooks.compat.cache_argument import cache_in
from softhooks.errors import PromptNotReachedError, PromptTooLongError, UnsupportedModeError
from softhooks.inject.caches import cache_of, is_filled, is_recurrent
from softhooks.inject.prefix.paged_cache import paged_cache
from softhooks.layout.layout import text_positions

OUTER_ARGUMENTS = ("position_ids", "attention_mask", "decoder_position_ids", "decoder_attention_mask")
"""The arguments of the model's own call that `OuterCall` is made from."""


@dataclass(frozen=True)
class OuterCall:
    """The caller's `position_ids` and `attention_mask`, for a stack inside the model.

    A model may number all tokens, including padding, and pass these positions to its text model, with a mask that is already
    prepared for attention. Then only the caller's own arguments show which tokens are padding.
    """

    positions: Any
    mask: Any


def row_count(stack: Stack, call: dict[str, Any]) -> int:
    """Return the number of rows in a call to a stack, also if it takes an image or a sound instead of a text."""
    if stack.features is None:
        return text_shape(call)[0]
    features = call.get(stack.features)
    if not isinstance(features, Tensor):
        raise PromptNotReachedError(
            f"the call to {type(stack.module).__name__} has no `{stack.features}`, which a prompt needs."
        )
    return features.shape[0]


def text_shape(call: dict[str, Any]) -> tuple[int, int]:
    """Return the batch size and the length of the text, including padding."""
    text = _text(call)
    if not isinstance(text, Tensor):
        raise PromptNotReachedError(
            "the call to the model's backbone has neither `input_ids` nor `inputs_embeds`; a prompt needs one of them."
        )
    return text.shape[0], text.shape[1]


def _text(call: dict[str, Any]) -> Any:
    return call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]


def past_of(call: dict[str, Any]) -> Any:
    """Return the length of the cache."""
    cache = cache_in(call)
    return 0 if cache is None or is_recurrent(cache) else cache.get_seq_length()


def padding_mask(call: dict[str, Any], outer: OuterCall | None) -> Tensor | None:
    """Return the attention mask with one value per token, [B, past + T], or None if there is none.

    If the model has prepared the mask for attention, this is the caller's mask.
    """
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    given = None if mask is None or outer is None else outer.mask
    if not isinstance(given, Tensor) or given.dim() != 2:
        return None
    batch, columns = text_shape(call)
    return given if given.shape[0] == batch and given.shape[1] >= columns else None


def given_positions(stack: Stack, call: dict[str, Any], outer: OuterCall | None) -> Tensor | None:
    """Return the `position_ids` of a call, or None; the first token of a sequence has the position `stack.positions.start`.

    If the model numbered all tokens itself, including padding, the positions are computed again without padding.
    """
    given = call.get("position_ids")
    if given is None:
        return None
    mask = None if outer is None or outer.positions is not None else padding_mask(call, outer)
    if mask is None:
        return torch.as_tensor(given)
    _, columns = text_shape(call)
    counted = torch.arange(columns, device=given.device) + past_of(call) + stack.positions.start
    if given.shape[-1] != columns or not bool((given == counted).all()):
        return torch.as_tensor(given)  # not a plain count of columns (M-RoPE)
    own = text_positions(mask.to(given.device))[:, -columns:] + stack.positions.start
    return own.expand(*given.shape[:-2], -1, -1) if given.dim() > 2 else own


def positions_in_text(stack: Stack, call: dict[str, Any], outer: OuterCall | None) -> Tensor:
    """Return the text's positions, counted from 0 in each row or document, [B or 1, T], or [A, B, T] for M-RoPE's axes."""
    given = given_positions(stack, call, outer)
    if given is not None:
        return given - stack.positions.start
    seen = prepared_mask(call) if padding_mask(call, outer) is None else None
    return counted_positions(call, outer) if seen is None else (seen.sum(-1) - 1).clamp_(min=0)


def prepared_mask(call: dict[str, Any]) -> Tensor | None:
    """Return the keys that each token sees in a call that continues a static cache, [B, T, K] bool, or None for other calls.

    `generate` prepares such masks before the forward. In a causal model, a token's position is the number of keys that it sees
    before itself.
    """
    mask, cache = call.get("attention_mask"), cache_in(call)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or not getattr(cache, "is_compileable", False):
        return None
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


def counted_positions(call: dict[str, Any], outer: OuterCall | None) -> Tensor:
    """Number the text's tokens from 0; if there is a mask, padding is not counted. -> [B or 1, T]."""
    _, columns = text_shape(call)
    mask = padding_mask(call, outer)
    if mask is not None:
        return text_positions(mask)[:, -columns:]
    counted: Tensor = torch.arange(columns, device=_text(call).device) + past_of(call)
    return counted[None]


def order_in_text(positions: Tensor | None, call: dict[str, Any], outer: OuterCall | None) -> Tensor | None:
    """Return the number of tokens before each token, [B or 1, T]. In an image, M-RoPE's positions differ from this number."""
    if positions is None or positions.dim() < 3:
        return positions
    # If there are four axes, the first one numbers the tokens of the text.
    return positions[0] if positions.shape[0] == 4 else counted_positions(call, outer)


def later_start(stack: Stack, call: dict[str, Any], outer: OuterCall | None) -> str:
    """Describe, for an error, `position_ids` that start the text after the stack's first position; return "" for any others.

    The prompt's keys and values are computed for the first positions, or were trained for them, so there would be a gap before
    the text. A text that continues a cache is not checked, nor are positions with several axes (M-RoPE), which locate parts of
    an image.
    """
    if call.get("position_ids") is None or not stack.positions.takes_position_ids:
        return ""
    if is_filled(cache_of(call)) or paged_cache(call) is not None:
        return ""
    given, mask = given_positions(stack, call, outer), padding_mask(call, outer)
    if given is None or given.dim() != 2 or (mask is None and call.get("attention_mask") is not None):
        return ""
    if mask is not None:
        # Use the first real column of each row, because the positions of padding mean nothing.
        first = mask[:, -given.shape[1] :].to(given.device).long().argmax(-1, keepdim=True)
        given = given.expand(len(first), -1).gather(1, first)
    starts = given[:, 0] - stack.positions.start
    return f"position_ids that start at {int(given[:, 0].max())}" if bool((starts > 0).any()) else ""


def later_start_error(stack: Stack, found: str) -> UnsupportedModeError:
    """Return the error for a text that `later_start` has described as `found`."""
    return UnsupportedModeError(
        f"the call has {found}, but the prompt's keys and values have the first positions; the text must directly follow them.",
        "Leave `position_ids` out or count them by the attention mask; or use PromptTuning, which works with such positions.",
        model=f"{type(stack.module).__name__}, which starts at {stack.positions.start}",
    )


def check_text_length(
    stack: Stack, call: dict[str, Any], length: int | Tensor, cached: int = 0, outer: OuterCall | None = None
) -> None:
    """Refuse a text that exceeds the learned positions, and warn if it exceeds the trained range of rotary positions.

    Args:
        length: the number of virtual tokens, or in a continuous batch the number before each token of the text, [1, T].
        cached: the number of virtual tokens that a filled cache contains.
    """
    positions = stack.positions
    limit = positions.limit if positions.limit is not None else positions.rotary_limit
    if limit is None or (isinstance(length, int) and length == 0) or (positions.limit is None and positions.has_warned):
        return
    if paged_cache(call) is not None and call.get("position_ids") is not None:
        # The columns of a continuous batch are the new tokens of all sequences, so only positions show a sequence's length.
        ids = call["position_ids"].flatten()
        before = torch.as_tensor(length, device=ids.device).expand(1, ids.numel()).flatten()
        last = int((ids + before).argmax())
        longest, length = int(ids[last]) + 1, int(before[last])
    elif isinstance(length, Tensor):
        return
    else:
        _, columns = text_shape(call)
        past = past_of(call)
        past = past - cached if past else past
        # The number of columns is a cheap upper bound, so the mask is only read for a text near the limit.
        if isinstance(past, Tensor) or past + columns + length <= limit:
            return
        mask = padding_mask(call, outer)
        longest = past + columns if mask is None else int(mask.long().sum(-1).max())
    if positions.limit is None:
        warn_beyond(positions, longest, length)
    elif longest + length > limit:
        error = PromptTooLongError(
            f"a prompt of {length} virtual tokens and a text of {longest} exceed the model's {limit} positions.",
            "Truncate the text further, or use a shorter prompt.",
            prompt=length,
            text=longest,
            positions=limit,
        )
        error.text = longest
        raise error
