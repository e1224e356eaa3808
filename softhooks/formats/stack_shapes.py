"""An outline of a model's stacks: their direction and attention shapes, which a saved prompt depends on."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from softhooks.backbone.stack import ModelStructure, Role, Stack


def outline(structure: ModelStructure) -> dict[str, dict[str, Any]]:
    """Outline the stacks of a model as JSON values.

    Returns:
        for each stack, whether it is causal and, by role, runs of layers with the same attention: `[layers, heads, key size,
        value size]`.
    """
    return {stack.name: {"causal": stack.causal, **_attention_shapes(stack)} for stack in structure.stacks}


def _attention_shapes(stack: Stack) -> dict[str, list[list[int]]]:
    roles: list[Role] = ["self", "cross"]
    shapes = {role: [[s.heads, s.key_dim, s.value_dim] for s in stack.sites_of(role)] for role in roles}
    return {role: [[len(list(run)), *shape] for shape, run in groupby(shapes[role])] for role in roles}


def on_one_line(stacks: dict[str, dict[str, Any]]) -> str:
    """Format an outline on one line, for errors."""
    return ", ".join(" ".join([name, *[f"{k}={v}" for k, v in stack.items()]]) for name, stack in stacks.items())
