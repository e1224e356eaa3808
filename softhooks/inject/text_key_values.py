"""The keys and values that the frozen model computes for a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.attention_interface import marked_sites
from softhooks.backbone.entry_points import groups_of
from softhooks.backbone.probing import eval_mode
from softhooks.backbone.recording_cache import RecordingCache
from softhooks.backbone.stack import ModelStructure, Stack
from softhooks.compat.offload import device_of
from softhooks.inject.prefill import CapturePass
from softhooks.inject.prefix.key_values import flatten


def key_values_of(structure: ModelStructure, ids: Tensor) -> dict[str, Tensor]:
    """Run a text through the frozen model and take its keys and values, for every group.

    In an encoder-decoder the text goes through both sides. Every token is kept, also in sliding layers.

    Shape:
        ids [P] -> {group: [P, numbers]}
    """
    ids = ids.to(device_of(structure.entry.embedding))[None]
    groups = groups_of(structure)
    captured: dict[str, Tensor] = {}
    encoded: Tensor | None = None
    for stack in structure.stacks:
        with eval_mode(stack.module), marked_sites(stack):
            keys, values, output = _capture(stack, ids, encoded)
        encoded = output
        for group, (owner, role) in groups.items():
            if owner is stack:
                captured[group] = flatten(keys[role], values[role], stack.sites_of(role)).float()
    return captured


def _capture(stack: Stack, ids: Tensor, encoded: Tensor | None) -> tuple[Any, Any, Tensor]:
    """Run one stack over [1, P] ids and note its keys and values by role and index."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if encoded is not None:
        inputs["encoder_hidden_states"] = encoded
    if "use_cache" in stack.parameters and stack.causal:
        inputs["use_cache"] = False
    cache = RecordingCache() if stack.injection == "cache" else None
    if cache is not None:
        inputs["past_key_values"] = cache
    live = CapturePass(stack)
    with stack.state.running(live):
        output = stack.module(**inputs)
    state: Tensor = output[0]
    if cache is not None:
        heard = cache.recorded
        return {"self": {i: k for i, (k, _) in heard.items()}}, {"self": {i: v for i, (_, v) in heard.items()}}, state
    return live.keys, live.values, state
