"""Find the cache of a call, and check whether it is empty."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from softhooks.compat.cache_argument import cache_in
from softhooks.errors import UnsupportedModeError


def cache_of(call: dict[str, Any]) -> Any:
    """Return the cache in the arguments of a stack's forward.

    RWKV's state is refused: it is a list of tensors, and the prompt that it was computed with cannot be recorded on a list.
    """
    if call.get("state") is not None:
        raise UnsupportedModeError(
            f"the call has `state`, a {type(call['state']).__name__} of tensors; softhooks cannot tell whether such a state was "
            "computed with the prompt.",
            "Generate with `use_cache=False`.",
        )
    return cache_in(call)


def is_recurrent(cache: Any) -> bool:
    """Whether a cache contains only states of recurrent layers, which have no sequence length."""
    layers = getattr(cache, "layers", None) or ()
    return bool(len(layers)) and not any(isinstance(layer, CacheLayerMixin) for layer in layers)


def is_filled(cache: Any) -> bool:
    """Whether a cache contains keys and values or the state of a recurrent layer."""
    for layer in getattr(cache, "layers", None) or ():
        states = getattr(layer, "has_previous_state", False)  # a bool, or a bool for each state of the layer
        if any(states.values()) if isinstance(states, dict) else states:
            return True
    return cache is not None and not is_recurrent(cache) and bool(int(cache.get_seq_length()))


def caches_in(output: Any) -> list[Any]:
    """List the caches in a stack's output."""
    items = [] if isinstance(output, Tensor) else output if isinstance(output, tuple) else output.values()
    return [item for item in items if hasattr(item, "get_seq_length")]
