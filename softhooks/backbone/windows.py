"""Find sliding windows and chunks in attention, even if only the attention masks show them (PhiMoE, Llama 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError

_PROBE_WINDOW = 2
"""A window that is shorter than a probe of four tokens."""


@contextmanager
def shortened_window(stack: Stack) -> Iterator[bool]:
    """Shorten the sliding window in the config of a causal stack while the `with` block runs; yield whether it has one."""
    config: Any = getattr(stack.module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not stack.causal or type(window) is not int or window <= 0:
        yield False
        return
    config.sliding_window = _PROBE_WINDOW  # calls a setter in configs that store it under another name
    try:
        yield True
    finally:
        config.sliding_window = window


def hides_distant(mask: Any, window: int = _PROBE_WINDOW) -> bool:
    """Whether an attention mask keeps the last query from attending to tokens before its window."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] <= window:
        return False
    distant = mask[0, 0, -1, -window - 1]
    return not bool(distant) if mask.dtype == torch.bool else bool(distant < torch.finfo(mask.dtype).min / 2)


def window_of(site: Site, kwargs: dict[str, Any]) -> int | None:
    """Return how many tokens, including itself, a token attends to in a call with these arguments; None if there is no window."""
    window = kwargs.get("sliding_window", getattr(site.module, "sliding_window", None))
    if window is None and site.is_windowed:
        window = getattr(site.stack.module.config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def require_one_chunk(stack: Stack, virtual_tokens: int, positions: Tensor | None) -> None:
    """Raise an error if prefix and text together exceed one chunk (Llama 4): the prefix would shift the end of each chunk.

    Args:
        virtual_tokens: the number of virtual tokens before the text in self-attention.
        positions: the positions of the text, counted from 0 in each row, [B or 1, T], or None if they are unknown.
    """
    config: Any = getattr(stack.module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    is_chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if not is_chunked or not isinstance(chunk, int) or not virtual_tokens:
        return
    longest = None if positions is None else int(positions.max()) + 1
    if longest is None or longest + virtual_tokens > chunk:
        raise UnsupportedModeError(
            "prefix and text together exceed one chunk of a model with chunked attention.",
            "Shorten the text, or use PromptTuning, whose virtual tokens are divided into chunks together with the text.",
            prefix=f"{virtual_tokens} virtual tokens",
            text="of unknown length" if longest is None else f"{longest} tokens",
            chunk=f"{chunk} tokens",
        )
