"""Where keys and values can enter a model, and whether a folded prompt fits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from softhooks.backbone.probing import OTHER_METHOD
from softhooks.errors import PromptMismatchError, UnsupportedMethodError

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


def check_tables(expected: Mapping[str, tuple[int, ...]], tables: dict[str, Tensor], source: str) -> None:
    """Check that a folded prompt fits a model.

    Args:
        expected: the shape of each table that fits the model.

    Raises:
        PromptMismatchError: tables or their shapes differ.
        UnsupportedMethodError: the prompt cannot enter the model.
    """
    for group in sorted(set(expected) | set(tables)):
        table = tables.get(group)
        if table is None or tuple(table.shape) != expected.get(group):
            shape = "absent" if table is None else str(list(table.shape))
            raise PromptMismatchError(
                "a prompt must be as wide as the model that it enters.",
                "Load it onto the base model that it was trained with.",
                prompt=f"{group} {shape} ({source})",
                model=f"{group} {list(expected[group])}" if group in expected else f"no {group} ({sorted(expected)})",
            )


def require_sites(structure: ModelStructure) -> None:
    """Check that keys and values can enter every stack.

    Raises:
        UnsupportedMethodError: naming the stack that they cannot enter.
    """
    for stack in structure.stacks:
        if stack.through is None:
            raise UnsupportedMethodError(
                "a key-value prefix needs attention that goes through transformers' attention interface or a cache, or "
                "that softhooks knows.",
                OTHER_METHOD,
                model=f"{type(stack.module).__name__}, whose attention does neither",
            )
