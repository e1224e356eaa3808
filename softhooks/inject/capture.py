"""Run a stack by itself, and record the keys and values that its attention modules compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.attention_groups import groups_of
from softhooks.backbone.attention_interface import marked_sites
from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.probing import eval_mode, last_hidden_state
from softhooks.backbone.recording_cache import RecordingCache
from softhooks.backbone.stack import ModelStructure, Role, Site, Stack
from softhooks.backbone.windows import window_of
from softhooks.compat.cache_argument import set_cache
from softhooks.compat.offload import device_of
from softhooks.inject.prefix.key_values import KeyValues, flatten
from softhooks.inject.prefix.paged_cache import attend_alone


class CapturePass(Pass):
    """A forward that records the keys and values of each attention layer.

    Args:
        rows: embeddings to use instead of the embedding layer's output, [B, P, H]; None to keep that output.
    """

    allows_checkpointing = False  # the prompt's keys and values must stay in the autograd graph

    def __init__(self, stack: Stack, rows: Tensor | None = None) -> None:
        super().__init__(stack)
        self.rows = rows
        self.keys: dict[Role, dict[int, Tensor]] = {"self": {}, "cross": {}}
        self.values: dict[Role, dict[int, Tensor]] = {"self": {}, "cross": {}}

    def embed(self, output: Tensor) -> Tensor:
        """Return the given embeddings instead of the embeddings of the placeholder ids."""
        return output if self.rows is None else self.rows.to(output).expand_as(output)

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the keys and values, [B, Hk, P, D], and run the attention function."""
        self.has_injected = True
        self.keys[site.role][site.index] = args[2]
        self.values[site.role][site.index] = args[3]
        return attend_alone(attention, window_of(site, kwargs), args, kwargs)


def capture(stack: Stack, inputs: dict[str, Any], rows: Tensor | None = None) -> tuple[dict[Role, KeyValues], Tensor]:
    """Run a stack; return its keys and values (by kind of attention, `self` or `cross`) and its last hidden state, [B, P, H].

    Args:
        inputs: the arguments of the stack's forward.
        rows: embeddings to use instead of the embeddings of `input_ids`, [B, P, H].
    """
    inputs = dict(inputs)
    if "use_cache" in stack.parameters and stack.causal:
        inputs["use_cache"] = False
    cache = RecordingCache() if stack.injection == "cache" else None
    if cache is not None:
        set_cache(inputs, cache, stack.parameters)
    forward_pass = CapturePass(stack, rows)
    with stack.state.running(forward_pass):
        state = last_hidden_state(stack.module(**inputs))
    if cache is not None:
        forward_pass.keys["self"] = {index: key for index, (key, _) in cache.recorded.items()}
        forward_pass.values["self"] = {index: value for index, (_, value) in cache.recorded.items()}
    return {role: KeyValues(keys, forward_pass.values[role]) for role, keys in forward_pass.keys.items()}, state


def key_values_of(structure: ModelStructure, ids: Tensor) -> dict[str, Tensor]:
    """Compute the frozen model's keys and values for a text, for each group of attention modules (see `groups_of`).

    An encoder-decoder runs the text through both stacks. The keys and values of all tokens are returned, even for layers with
    sliding windows.

    Shape:
        ids [P] -> {group: [P, sum over layers of Hk * (Dk + Dv)]}
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
