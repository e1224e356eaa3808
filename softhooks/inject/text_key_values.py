"""Compute the keys and values of the frozen model for a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.attention_groups import groups_of
from softhooks.backbone.attention_interface import marked_sites
from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of
from softhooks.inject.capture import capture
from softhooks.inject.prefix.key_values import flatten


def key_values_of(structure: ModelStructure, ids: Tensor) -> dict[str, Tensor]:
    """Run a text through the frozen model and return its keys and values, for every group.

    In an encoder-decoder the text goes through both stacks. All tokens are returned, even for layers with sliding windows.

    Shape:
        ids [P] -> {group: [P, numbers]}
    """
    inputs: dict[str, Any] = {"input_ids": ids.to(device_of(structure.entry.embedding))[None]}
    groups = groups_of(structure)
    captured: dict[str, Tensor] = {}
    for stack in structure.stacks:
        with eval_mode(stack.module), marked_sites(stack):
            found, inputs["encoder_hidden_states"] = capture(stack, inputs)
        for group, (owner, role) in groups.items():
            if owner is stack:
                captured[group] = flatten(found[role].keys, found[role].values, stack.sites_of(role)).float()
    return captured
