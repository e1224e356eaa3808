"""Key-value prefixes in continuous batching, where the sequences of many requests share one row and one paged cache.

The attention function writes to the cache and reads from it, and its mask keeps the sequences apart. The prefix is prepended
to the keys and values that were read, once for all sequences. It is never written to the cache, because requests with the same
ids share cache blocks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from softhooks.backbone.forward_pass import AttentionFunction, function_name
from softhooks.inject.prefix.key_values import KeyValues


def paged_cache(arguments: dict[str, Any]) -> PagedAttentionCache | None:
    """Return the paged cache in the arguments of a stack or an attention function, or None outside of continuous batching."""
    cache = arguments.get("cache")
    return cache if isinstance(cache, PagedAttentionCache) else None


class PrefixedPagedCache(PagedAttentionCache):
    """A paged cache that returns a prefix before its own keys and values, for one call to an attention function.

    Args:
        prefix: keys and values that all sequences share.
        index: the index of the attention layer.
    """

    def __init__(self, cache: PagedAttentionCache, prefix: KeyValues, index: int) -> None:
        self._cache = cache
        self._prefix = (prefix.keys[index], prefix.values[index])

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Update the cache and prepend the prefix. [1, Hk, T, D] -> [1, Hk, P + K, D]; older transformers: [P + K, Hk, D]."""
        key, value = map(_prepend, self._prefix, self._cache.update(*args, **kwargs))
        return key, value


def _prepend(own: Tensor, read: Tensor) -> Tensor:
    if read.dim() == 3:
        return torch.cat([own[0].transpose(0, 1).to(read), read])
    return torch.cat([own.to(read), read], dim=2)


def attend_alone(
    attention: AttentionFunction, window: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run attention over virtual tokens alone; a function that needs a paged cache is replaced by eager attention.

    Args:
        window: the sliding window of the layer, if it has one.
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
    # The function of the module's modeling file, without softhooks' wrapper.
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return getattr(eager, "__wrapped__", eager)(module, query, key, value, mask, *args[5:], **kwargs)
