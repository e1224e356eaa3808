"""What a file says about the pass that its prompt takes for granted, checked."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.errors import CheckpointError
from softhooks.method import Method


def read_conventions(value: Any, method: Method, source: str) -> dict[str, Any]:
    """Check the conventions of a file against its method and options.

    Raises:
        CheckpointError: they are not those that a prompt of the method has.
    """
    allowed = {key: _as_the_options_say(method, key, values) for key, values in method.conventions_allowed.items()}
    if "placement" in allowed:
        allowed["placement"] = (method.where.placement,)
    held = dict(value) if isinstance(value, dict) else {}
    ids = held.pop(BUFFER, None)
    if set(held) != set(allowed) or not all(held[key] in allowed[key] for key in allowed):
        raise CheckpointError(
            "a prompt must say the conventions that it was trained with, and no others.",
            "If a newer softhooks wrote it, upgrade this one.",
            file=source,
            expected={key: list(values) for key, values in allowed.items()},
            found=value,
        )
    if ids is None:
        return held
    count = method.num_virtual_tokens
    whole = isinstance(ids, list) and len(ids) == count and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not whole or method.enters != "embeddings":
        raise CheckpointError(
            "a prompt of embedding rows may say which id stands behind each virtual token.",
            "Save the prompt again.",
            file=source,
            expected=f"{count} ids" if method.enters == "embeddings" else "none",
            found=str(ids)[:80],
        )
    return held | {BUFFER: ids}


def _as_the_options_say(method: Method, key: str, allowed: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values that a convention may have beside the options; an option that is None leaves all of them."""
    option = getattr(method, key, None)
    return (option,) if option in allowed else allowed
