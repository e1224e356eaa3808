"""Find sliding windows and chunks that only the masks of a layer define.

PhiMoE has its windows in its masks and does not pass them to the attention function. Llama 4 cuts a text into chunks, and its
tokens see only the tokens of their own chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError

_PROBE_WINDOW = 2
"""A window that hides tokens in a probe of four tokens."""


@contextmanager
def shortened_window(stack: Stack) -> Iterator[bool]:
    """Shorten the sliding window of a causal stack while the `with` block runs; yield False if its config has no window."""
    config: Any = getattr(stack.module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not stack.causal or type(window) is not int or window <= 0:
        yield False
        return
    config.sliding_window = _PROBE_WINDOW  # by its setter: some configs store it under another name
    try:
        yield True
    finally:
        config.sliding_window = window


def hides_distant(mask: Any, window: int = _PROBE_WINDOW) -> bool:
    """Whether an attention mask hides tokens outside the window from the last query."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] <= window:
        return False
    distant = mask[0, 0, -1, -window - 1]
    return not bool(distant) if mask.dtype == torch.bool else bool(distant < torch.finfo(mask.dtype).min / 2)


def window_of(site: Site, kwargs: dict[str, Any]) -> int | None:
    """Return the number of tokens, including itself, that a token of a site sees, or None if it sees all of them.

    Args:
        kwargs: the keyword arguments of the attention function's call.
    """
    window = kwargs.get("sliding_window", getattr(site.module, "sliding_window", None))
    if window is None and site.is_windowed:
        window = getattr(site.stack.module.config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def require_one_chunk(stack: Stack, virtual_tokens: int, positions: Tensor | None) -> None:
    """Refuse a prefix and a text that together exceed the first chunk, because the model would end its chunks P tokens late.

    Args:
        virtual_tokens: the number of virtual tokens before the text in self-attention, at their own positions.
        positions: the positions of the text, counted from 0 in each row, [B or 1, T].

    Raises:
        UnsupportedModeError: prefix and text together are longer than a chunk.
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
            "Shorten the text, or use PromptTuning, whose virtual tokens are cut into chunks with the text.",
            prefix=f"{virtual_tokens} virtual tokens",
            text="of unknown length" if longest is None else f"{longest} tokens",
            chunk=f"{chunk} tokens",
        )
