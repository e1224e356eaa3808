"""A front prompt of a causal decoder, run once: its keys and values serve every row.

Virtual tokens at the front see only each other, so their states are the same in every row, whatever follows. They run at batch
1, under autograd, and enter as a prefix. When a later forward may use them again is a matter of `reuse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.module_walk import every_module
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.recording_cache import RecordingCache
from softhooks.backbone.stack import Site, Stack
from softhooks.backbone.windows import window_of
from softhooks.inject.checkpointing import is_checkpointed
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.paged_cache import attend_alone


class CapturePass(Pass):
    """Run given rows through a stack, and note the keys and values that its attention sees.

    Args:
        rows: what the embedding returns, [B, P, H]; None leaves the embedding's own output.
    """

    def __init__(self, stack: Stack, rows: Tensor | None = None) -> None:
        super().__init__(stack)
        self.rows = rows
        self.keys: dict[str, dict[int, Tensor]] = {"self": {}, "cross": {}}
        self.values: dict[str, dict[int, Tensor]] = {"self": {}, "cross": {}}

    def embed(self, output: Tensor) -> Tensor:
        """Return the given rows in the place of the placeholder's."""
        return output if self.rows is None else self.rows.to(output).expand_as(output)

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note keys and values, [B, Hk, P, D], and go on."""
        self.touched = True
        self.keys[site.role][site.index] = args[2]
        self.values[site.role][site.index] = args[3]
        return attend_alone(attention, window_of(site, kwargs), args, kwargs)


def prefill(stack: Stack, rows: Tensor, placeholder: Tensor) -> KeyValues:
    """Run virtual tokens through a stack, each variant of a prompt in one row.

    Args:
        rows: the prompt, [R, P, H]; R is 1 where all rows of the batch share one.
        placeholder: the ids behind the virtual tokens, for what looks at ids beyond the lookup, [P].
    """
    variants, length = rows.shape[:2]
    inputs: dict[str, Any] = {"input_ids": placeholder.to(rows.device).expand(variants, length)}
    if stack.positions.argument:
        inputs["position_ids"] = torch.arange(length, device=rows.device)[None] + stack.positions.start
    if "use_cache" in stack.parameters:
        inputs["use_cache"] = False
    cache = RecordingCache() if stack.injection == "cache" else None
    if cache is not None:
        inputs["past_key_values"] = cache
    live = CapturePass(stack, rows)
    with stack.state.running(live, alone="a prompt's own rows"), _without_checkpointing(stack.module):
        states = last_hidden_state(stack.module(**inputs))
    keys, values = live.keys["self"], live.values["self"]
    if cache is not None:
        keys = {i: k for i, (k, _) in cache.recorded.items()}
        values = {i: v for i, (_, v) in cache.recorded.items()}
    return KeyValues(keys, values, states=states)


class _StatesAlone(BaseModelOutput):
    """A stack's output with nothing but states; whatever else a model looks for there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def logits_of(model: nn.Module, stack: Stack, states: Tensor, placeholder: int) -> Tensor:
    """Let what stands on a stack (head, scale, cap) answer for given states; the stack itself does not run.

    Shape:
        states [R, P, H] -> logits [R, P, V]
    """
    module = stack.module
    own = module.__dict__.get("forward")
    with stack.state.running(Pass(stack), alone="a prompt's own rows"):
        module.__dict__["forward"] = lambda *_args, **_kwargs: _StatesAlone(last_hidden_state=states)
        try:
            ids = torch.full(states.shape[:2], placeholder, device=states.device)
            logits: Tensor = model(input_ids=ids, return_dict=True).logits
            return logits
        finally:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Keep the few rows of a prompt out of checkpoints: their keys and values must stay in the graph."""
    layers = [part for part in every_module(module) if is_checkpointed(part)]
    for part in layers:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in layers:
            part.gradient_checkpointing = True  # type: ignore[assignment]
