"""What a prompt takes for granted about the stacks of its model, as a file holds it and as an error says it."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from softhooks.backbone.stack import ModelStructure, Role, Stack


def outline(structure: ModelStructure) -> dict[str, dict[str, Any]]:
    """What a prompt takes for granted about a model, as JSON can hold it.

    For each stack whether it is causal, and for each role its attention: runs of `[layers, heads, key size, value size]`.
    """
    return {stack.name: {"causal": stack.causal, **_sites(stack)} for stack in structure.stacks}


def _sites(stack: Stack) -> dict[str, list[list[int]]]:
    roles: list[Role] = ["self", "cross"]
    shapes = {role: [[s.heads, s.key_dim, s.value_dim] for s in stack.sites_of(role)] for role in roles}
    return {role: [[len(list(run)), *shape] for shape, run in groupby(shapes[role])] for role in roles}


def in_words(stacks: dict[str, dict[str, Any]]) -> str:
    """What an outline says, on one line."""
    return ", ".join(" ".join([name, *[f"{k}={v}" for k, v in stack.items()]]) for name, stack in stacks.items())
