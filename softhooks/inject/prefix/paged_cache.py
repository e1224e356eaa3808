"""Prefixes with the paged cache of continuous batching, in which the sequences of many requests share one row.

The attention function writes to the cache and reads from it, and its mask keeps the sequences apart. The prompt is one block of
columns that all sequences see, before all other columns: its keys and values are prepended once for all requests, after the
update of the cache. They never enter the cache itself, because requests with the same ids share cache blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from softhooks.backbone.forward_pass import AttentionFunction, function_name
from softhooks.inject.prefix.key_values import KeyValues


def paged_cache(arguments: dict[str, Any]) -> PagedAttentionCache | None:
    """Return the paged cache in the arguments of a stack or an attention function, or None outside of continuous batching."""
    cache = arguments.get("cache")
    return cache if isinstance(cache, PagedAttentionCache) else None


def longest_text(call: dict[str, Any]) -> int | None:
    """Return the length of the longest sequence in a continuous batch, from the positions, or None outside of such a batch.

    The number of columns is different: it counts the new tokens of several sequences, without the tokens in the cache.
    """
    positions = call.get("position_ids")
    return None if paged_cache(call) is None or positions is None else int(positions.max()) + 1


class PrefixedPagedCache(PagedAttentionCache):
    """A paged cache for one call of an attention function that returns the prompt's keys and values before its own.

    Args:
        cache: the cache of the batch.
        prefix: the prompt's keys and values, shared by all sequences.
        index: the index of the site.
    """

    def __init__(self, cache: PagedAttentionCache, prefix: KeyValues, index: int) -> None:
        self._cache = cache
        self._prefix = (prefix.keys[index], prefix.values[index])

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Update the cache and prepend the prefix. [1, Hk, T, D] -> [1, Hk, P + K, D], or [P + K, Hk, D] (older versions)."""
        key, value = map(_prepend, self._prefix, self._cache.update(*args, **kwargs))
        return key, value


def _prepend(own: Tensor, read: Tensor) -> Tensor:
    if read.dim() == 3:
        return torch.cat([own[0].transpose(0, 1).to(read), read])
    return torch.cat([own.to(read), read], dim=2)


def attend_alone(
    attention: AttentionFunction, window: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run attention over a prompt's own rows. They are not in a cache, even if the model's function needs a paged cache.

    Args:
        attention: the model's attention function; replaced by eager attention if it needs a paged cache.
        window: the sliding window of the site, if it has a window.
    """
    if "paged" not in function_name(attention):
        return attention(*args, **kwargs)
    module, query, key, value = args[:4]
    columns = key.shape[2]
    seen = torch.ones(columns, columns, dtype=torch.bool, device=key.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    mask = torch.zeros(1, 1, columns, columns, dtype=query.dtype, device=query.device)
    mask.masked_fill_(~seen, torch.finfo(query.dtype).min)
    kwargs = {name: given for name, given in kwargs.items() if name != "attention_mask"}
    return _eager(module)(module, query, key, value, mask, *args[5:], **kwargs)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of a modeling file, without softhooks' wrapper."""
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return getattr(function, "__wrapped__", function)
