"""Check that a prompt and the text of a call fit into the model's positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.max_positions import warn_beyond
from softhooks.backbone.stack import Stack
from softhooks.errors import PromptTooLongError
from softhooks.inject.prefix.paged_cache import longest_text
from softhooks.inject.text_positions import OuterCall, padding_mask, past_of, text_shape


def check_text_length(
    stack: Stack, call: dict[str, Any], length: int, cached: int = 0, outer: OuterCall | None = None
) -> None:
    """Refuse a text that would exceed the learned positions, and warn if it exceeds the trained range of rotary positions.

    Args:
        length: the number of virtual tokens.
        cached: the number of virtual tokens in a cache that is not empty.
        outer: the arguments of the model's own call.

    Raises:
        PromptTooLongError: prompt and text together, without padding, exceed the position table.
    """
    positions = stack.positions
    limit = positions.limit if positions.limit is not None else positions.rotary_limit
    if limit is None or length == 0 or (positions.limit is None and positions.has_warned):
        return
    longest = longest_text(call)
    if longest is None:
        _, columns = text_shape(call)
        past = past_of(call)
        past = past - cached if past else past
        # The number of columns is a free upper bound, so the mask is only read for a text near the limit.
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
