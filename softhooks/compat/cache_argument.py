"""The argument that contains the cache: `cache` since transformers 5.24, and `past_key_values` or `cache_params` before it.

transformers 5.24 still accepts the old names; its forwards rename them, but hooks run before that and see either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

_OLD = ("past_key_values", "cache_params")
IS_RENAMED = Version(version("transformers")) >= Version("5.24.dev0")  # without importing it, which takes seconds
NAMES = ("cache", *_OLD) if IS_RENAMED else _OLD
"""All names of the argument, and of the cache in a model's output, in the order in which to look for them."""

CACHE = NAMES[0]
"""The name of the argument in the installed version of transformers."""


def cache_name(parameters: Collection[str]) -> str | None:
    """Return the name of a forward's argument for a cache of keys and values; None if it has none."""
    return next((name for name in (CACHE, "past_key_values") if name in parameters), None)


def cache_in(call: Mapping[str, Any]) -> Any:
    """Return the cache in the arguments of a forward or in its output, or None."""
    for name in NAMES:
        value = call.get(name)
        # FlauBERT's `cache` is a dictionary, and that of continuous batching contains the pages of all requests.
        if value is not None and (name != "cache" or hasattr(value, "get_seq_length")):
            return value
    return None


def set_cache(call: dict[str, Any], cache: Any, parameters: Collection[str]) -> None:
    """Put a cache into the arguments of a forward, in place of the one that is there.

    Raises:
        KeyError: the forward has no such argument.
    """
    name = cache_name(parameters)
    if name is None:
        raise KeyError("the forward has no argument for a cache.")
    for other in NAMES:
        call.pop(other, None)
    call[name] = cache
