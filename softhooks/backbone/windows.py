"""How far the tokens of a layer look back, where nobody tells its attention function: windows and chunks that are in masks alone.

PhiMoE's windows are in its masks and not in the call of the attention function; Llama 4 cuts a text into chunks, in which tokens
see those of their own chunk alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError

SHORT = 2
"""A window that a probe of four tokens shows."""


def short_window(stack: Stack) -> Any:
    """The config of a causal stack whose windows can be made short for a probe; None where it names none."""
    config: Any = getattr(stack.module, "config", None)
    window = getattr(config, "sliding_window", None)
    return config if stack.causal and type(window) is int and window > 0 else None


def hides_distant(mask: Any, window: int = SHORT) -> bool:
    """Whether a mask of attention hides from the last query what is farther than a window."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] <= window:
        return False
    distant = mask[0, 0, -1, -window - 1]
    return not bool(distant) if mask.dtype == torch.bool else bool(distant < torch.finfo(mask.dtype).min / 2)


def window_of(site: Site, kwargs: dict[str, Any]) -> int | None:
    """How many tokens, itself among them, a token of a site sees; None: all.

    Args:
        kwargs: of the call of the attention function.
    """
    told = kwargs.get("sliding_window", getattr(site.module, "sliding_window", None))
    if told is None and site.is_windowed:
        told = getattr(site.stack.module.config, "sliding_window", None)
    return told if isinstance(told, int) and told > 0 else None


def require_one_chunk(stack: Stack, virtual_tokens: int, positions: Tensor | None) -> None:
    """Refuse a text that leaves its first chunk behind a prefix: its chunks would be cut P tokens too late.

    Args:
        virtual_tokens: how many stand before the text in self-attention, at positions of their own.
        positions: where the text stands, counted from 0 in each row, [B or 1, T].

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
            "a prefix and its text must fit into one chunk of a model with chunked attention.",
            "Shorten the text, or use PromptTuning, whose virtual tokens are cut into chunks with the text.",
            prefix=f"{virtual_tokens} virtual tokens",
            text="of unknown length" if longest is None else f"{longest} tokens",
            chunk=f"{chunk} tokens",
        )
