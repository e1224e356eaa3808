"""Refuse a forward in which documents packed into one row could attend to each other.

A prompt that enters as keys and values precedes every document, and the positions of each document start after it. The mask
keeps the documents apart. In most models, transformers makes the mask from `position_ids`, but only if the call has neither
an attention mask nor a cache. So softhooks checks the masks in every forward with packed documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction, CheckAttention, function_name
from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError


def document_numbers(positions: Any, mask: Any, columns: int) -> Tensor | None:
    """Return the index of each token's document in its row, [B or 1, T], or None if every row has only one document.

    A document starts where the positions restart.

    Args:
        positions: the caller's `position_ids`, [B or 1, T], or [4, B, T] (M-RoPE), in which the positions in the text come first.
        mask: the caller's mask; positions of padding are ignored. If the mask is already prepared for attention, the result is
            None, because then the mask alone decides which tokens see each other.
        columns: the length of the text, T.
    """
    is_flat = isinstance(mask, Tensor) and mask.dim() == 2
    if not isinstance(positions, Tensor) or columns < 2 or (mask is not None and not is_flat):
        return None
    rows = positions[0] if positions.dim() == 3 and positions.shape[0] == 4 else positions
    if rows.dim() != 2 or rows.shape[1] != columns:
        return None
    # Each position is compared with the position of the last real column before it.
    last = torch.arange(columns, device=rows.device)[None]
    real = None if mask is None else mask[:, -columns:].to(rows.device).bool()
    if real is not None:
        rows = rows.expand(real.shape[0], -1)
        last = torch.where(real, last, 0).cummax(-1).values
    before = rows.gather(1, last.expand_as(rows)[:, :-1])
    restarts = rows[:, 1:] <= before
    if real is not None:
        restarts = restarts & real[:, 1:] & (real.long().cumsum(-1)[:, :-1] > 0)
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))


def require_masks(stack: Stack, numbers: Tensor, by_position: bool) -> None:
    """Refuse packed documents in a stack whose masks cannot be checked, or cannot keep documents apart.

    Args:
        numbers: the result of `document_numbers`.
        by_position: whether the stack itself received the positions, without which it cannot tell documents apart.
    """
    if stack.injection != "attention" or not by_position:
        raise _refusal(
            numbers,
            f"unknown: {type(stack.module).__name__} builds it without `position_ids`, or in code that softhooks cannot hook",
        )


def check_of_documents(numbers: Tensor) -> CheckAttention:
    """Return a function for `Pass.check_attention` that refuses masks that let documents attend to each other."""
    checked: list[Any] = []  # most layers receive the same mask object

    def check(site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        if site.role == "self" and not any(mask is one for one in checked):
            _check(numbers, mask, args[2].shape[2], function_name(attention))
            checked.append(mask)

    return check


def _check(numbers: Tensor, mask: Any, keys: int, function: str) -> None:
    """Refuse a mask that lets a query see another document, or that does not show whether it does."""
    if function.startswith("flash"):
        raise _refusal(numbers, f"{function} keeps documents apart by itself, but not with a prompt before them")
    if not isinstance(mask, Tensor) or keys != numbers.shape[1] or mask.shape[-1] != keys:
        raise _refusal(numbers, "none that keeps them apart")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    asking = numbers[:, -mask.shape[-2] :]  # a layer may have queries only for the last columns
    other = asking[:, None, :, None] != numbers[:, None, None, :]
    if bool((seen & other.to(mask.device)).any()):
        raise _refusal(numbers, f"{list(mask.shape)}, in which they see each other")


def _refusal(numbers: Tensor, mask: str) -> UnsupportedModeError:
    return UnsupportedModeError(
        "documents packed into one row could see each other in this call; a document must see only the prompt and itself.",
        "Pass the packed row without an attention mask and with `use_cache=False` (as a Trainer does), and use 'sdpa' or 'eager' "
        "attention; if the model has no masks for packed rows, put each document into its own row.",
        documents=f"up to {int(numbers[:, -1].max()) + 1} in a row, because position_ids restart",
        mask=mask,
    )
