"""Continuous batching: the sequences of many requests in one row, their keys and values in a paged cache.

Attention itself writes to the cache and reads from it, and its mask keeps the sequences apart. A prompt that all of them see is
one more run of columns, before all others and seen by every query: its keys and values are joined once, for all requests, right
after the cache has been updated. They never enter the cache, whose blocks requests share by their ids alone.
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
    """The paged cache among the arguments of a stack or of an attention function, if this is a continuous batch."""
    cache = arguments.get("cache")
    return cache if isinstance(cache, PagedAttentionCache) else None


def longest_text(call: dict[str, Any]) -> int | None:
    """How many tokens the longest sequence of a continuous batch has; None where this is none.

    Its positions tell: the row holds new tokens of several sequences, and what they read from the cache is not in the call.
    """
    positions = call.get("position_ids")
    return None if paged_cache(call) is None or positions is None else int(positions.max()) + 1


class PrefixedPagedCache(PagedAttentionCache):
    """A paged cache for one call of an attention function, which hands out the prompt's keys and values before its own.

    Args:
        cache: where the call's keys and values are written and read.
        prefix: the prompt's, shared by all sequences.
        index: the site's.
    """

    def __init__(self, cache: PagedAttentionCache, prefix: KeyValues, index: int) -> None:
        self._cache = cache
        self._prefix = (prefix.keys[index], prefix.values[index])

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Update the cache, and join. [1, Hk, T, D] -> [1, Hk, P + K, D], or [P + K, Hk, D] in earlier transformers."""
        key, value = map(_behind, self._prefix, self._cache.update(*args, **kwargs))
        return key, value


def _behind(own: Tensor, read: Tensor) -> Tensor:
    if read.dim() == 3:
        return torch.cat([own[0].transpose(0, 1).to(read), read])
    return torch.cat([own.to(read), read], dim=2)


def attend_alone(
    attention: AttentionFunction, window: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a prompt's own rows, which stand in no cache, while the model's attention is one for paged caches only.

    Args:
        attention: what was called; anything but such a function runs as it is.
        window: of the site, if it has one.
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
    """The attention function that a model's file brings along, unwrapped."""
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return getattr(function, "__wrapped__", function)
