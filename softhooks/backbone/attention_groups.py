"""The groups of attention modules that a key-value prefix enters; each group has its own table of keys and values."""

from __future__ import annotations

from typing import Literal

from softhooks.backbone.probing import OTHER_METHOD
from softhooks.backbone.stack import ModelStructure, Stack
from softhooks.errors import UnsupportedMethodError


def groups_of(structure: ModelStructure) -> dict[str, tuple[Stack, Literal["self", "cross"]]]:
    """Return each group's stack and kind of attention, keyed by the group's name.

    The groups are `text` or, in an encoder-decoder, `encoder`, `decoder` and `cross`.
    """
    groups: dict[str, tuple[Stack, Literal["self", "cross"]]] = {}
    for stack in structure.stacks:
        groups[stack.name] = (stack, "self")
        if stack.sites_of("cross"):
            groups["cross"] = (stack, "cross")
    return groups


def require_sites(structure: ModelStructure) -> None:
    """Raise an `UnsupportedMethodError` if the model has a stack that keys and values cannot enter."""
    for stack in structure.stacks:
        if stack.injection is None:
            raise UnsupportedMethodError(
                f"{type(stack.module).__name__} has no attention that a key-value prefix can enter: it uses neither "
                "transformers' attention interface nor a cache, and softhooks does not support its own attention code.",
                OTHER_METHOD,
            )
