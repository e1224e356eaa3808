"""Whether a call's text starts elsewhere than where the bare model starts to count: then a prompt before it starts there too.

Slots in the sequence do. Keys and values that are computed or trained once stand at the first positions, and would leave a gap.
"""

from __future__ import annotations

from typing import Any

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.caches import cache_of, is_filled
from softhooks.inject.prefix.paged import paged_cache
from softhooks.inject.text_position import Outer, given_positions, padding_mask


def starts_elsewhere(stack: Stack, call: dict[str, Any], outer: Outer | None) -> str:
    """Say so in words; empty where the text starts at the first position, or nothing tells.

    A text that goes on behind a cache has started already. Positions of several axes (M-RoPE) are an image's affair.
    """
    if call.get("position_ids") is None or not stack.positions.argument:
        return ""
    if is_filled(cache_of(call)) or paged_cache(call) is not None:
        return ""
    given, mask = given_positions(stack, call, outer), padding_mask(call, outer)
    if given is None or given.dim() != 2 or (mask is None and call.get("attention_mask") is not None):
        return ""
    if mask is not None:
        first = mask[:, -given.shape[1] :].to(given.device).long().argmax(-1, keepdim=True)
        given = given.expand(len(first), -1).gather(1, first)
    starts = given[:, 0] - stack.positions.start
    return f"position_ids that start at {int(given[:, 0].max())}" if bool((starts > 0).any()) else ""


def later_start_error(stack: Stack, found: str) -> UnsupportedModeError:
    """The error for such a call where the prompt's keys and values stay at the first positions.

    Args:
        found: what `starts_elsewhere` has found.
    """
    return UnsupportedModeError(
        f"the call brings {found}, but a prompt that enters as keys and values takes the first positions, and the text those "
        "right after it.",
        "Leave `position_ids` out or count it by the attention mask; or use PromptTuning, which moves along.",
        call=found,
        model=f"{type(stack.module).__name__}, which starts at {stack.positions.start}",
    )
