"""Where keys and values can enter a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from softhooks.backbone.probing import OTHER_METHOD
from softhooks.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure, Stack


def groups_of(structure: ModelStructure) -> dict[str, tuple[Stack, Literal["self", "cross"]]]:
    """Name the places that keys and values can enter: `text`, or `encoder`, `decoder` and `cross`."""
    groups: dict[str, tuple[Stack, Literal["self", "cross"]]] = {}
    for stack in structure.stacks:
        groups[stack.name] = (stack, "self")
        if stack.sites_of("cross"):
            groups["cross"] = (stack, "cross")
    return groups


def require_sites(structure: ModelStructure) -> None:
    """Check that keys and values can enter every stack.

    Raises:
        UnsupportedMethodError: naming the stack that they cannot enter.
    """
    for stack in structure.stacks:
        if stack.injection is None:
            raise UnsupportedMethodError(
                "a key-value prefix needs attention that goes through transformers' attention interface or a cache, or "
                "that softhooks knows.",
                OTHER_METHOD,
                model=f"{type(stack.module).__name__}, whose attention does neither",
            )
