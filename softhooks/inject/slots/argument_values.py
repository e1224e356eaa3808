"""Choose the values that per-token arguments, such as token types or bounding boxes, have at slots.

A slot gets the value that the tokenizer gives to padding. Test forward passes check that the model itself uses this value if the
argument is missing; token types are not checked. The language of a slot is the language of its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.probing import FORWARD_ERRORS, eval_mode, last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.layout.slot_map import Widened

_PADDED: dict[str, tuple[str, str | int]] = {
    # argument: the value's name in the config ("" for 0), and the last dimension's size or its name in the config (0: none)
    "token_type_ids": ("", 0),
    "bbox": ("", 4),
    "xpath_tags_seq": ("tag_pad_id", "max_depth"),
    "xpath_subs_seq": ("subs_pad_id", "max_depth"),
}
ZERO_AT_SLOTS = ("token_type_ids", "visual_pos_masks", "image_embeds_position_mask")
"""Arguments that are 0 at slots: a slot has the first token type and is not part of an image."""
COPIED = ("langs",)
"""Arguments for which a slot has the value of the row's first token."""


def find_fills(stack: Stack, ids: Tensor) -> dict[str, int]:
    """Return the values of per-token arguments at slots, by name. All prompts must be disabled.

    The model's padding value is returned only if passing it for every token of `ids`, [1, T], gives the same states as leaving
    the argument out. Token types always get 0.
    """
    config = getattr(stack.module, "config", None)
    fills: dict[str, int] = {}
    asked = [name for name in _PADDED if name in stack.parameters]
    if not asked:
        return fills
    with eval_mode(stack.module):
        without = _state(stack, {"input_ids": ids})
        for name in asked:
            place, size = _PADDED[name]
            value = getattr(config, place, None) if place else 0
            numbers = getattr(config, size, None) if isinstance(size, str) else size
            if not isinstance(value, int) or not isinstance(numbers, int):
                continue
            shape = (*ids.shape, numbers) if numbers else tuple(ids.shape)
            filled = _state(stack, {"input_ids": ids, name: torch.full(shape, value, device=ids.device)})
            known = without is not None and filled is not None and torch.equal(without, filled)
            if name == "token_type_ids" or known:
                fills[name] = value
    return fills


def _state(stack: Stack, inputs: dict[str, Tensor]) -> Tensor | None:
    try:
        return last_hidden_state(stack.module(**inputs))
    except FORWARD_ERRORS:  # the model does not take the argument alone, so its value at slots stays unknown
        return None


def fill(call: dict[str, Any], wide: Widened, fills: dict[str, int]) -> None:
    """Insert the slots' values into the per-token arguments of a call, in place; `fills` is the result of `find_fills`."""
    columns, fills = wide.text.shape[1], {**dict.fromkeys(ZERO_AT_SLOTS, 0), **fills}
    for name, value in call.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != columns:
            continue
        if name in fills:
            call[name] = wide.spread(value, fills[name])
        elif name in COPIED:
            widened = wide.spread(value, 0)
            first = value[:, :1].expand(-1, wide.slots.shape[1])
            call[name] = widened.scatter(1, wide.slots, first)
