"""Run a prompt through a causal decoder once, and use the resulting keys and values as the prefix of every row.

Virtual tokens before the text attend only to each other, so their states are the same in every row. Each variant of the
prompt, such as the prompt of one task, runs once, with gradients. `softhooks.inject.reuse` decides whether a later forward may
reuse the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.stack import Stack
from softhooks.inject.capture import capture
from softhooks.inject.checkpointing import ask_pass_for_checkpointing
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.patching.patches import patched


def prefill(stack: Stack, rows: Tensor, placeholder: Tensor) -> KeyValues:
    """Run virtual tokens through a stack, and return their keys, values and last hidden states.

    Args:
        rows: the embeddings of each variant of the prompt, [R, P, H].
        placeholder: the ids of the virtual tokens, [P], for models that read ids as well as embeddings.
    """
    variants, length = rows.shape[:2]
    inputs: dict[str, Any] = {"input_ids": placeholder.to(rows.device).expand(variants, length)}
    if stack.positions.takes_position_ids:
        inputs["position_ids"] = torch.arange(length, device=rows.device)[None] + stack.positions.start
    ask_pass_for_checkpointing(stack)
    found, states = capture(stack, inputs, rows)
    return replace(found["self"], states=states)


class _StatesOnly(BaseModelOutput):
    """A stack's output with only the last hidden state; any other attribute that a model reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def logits_of(model: nn.Module, stack: Stack, states: Tensor, placeholder: int) -> Tensor:
    """Compute the model's logits from hidden states without running the stack. [R, P, H] -> [R, P, V].

    The model's own forward runs, so the logits are scaled and capped as usual.
    """

    def forward(*_args: Any, **_kwargs: Any) -> _StatesOnly:
        return _StatesOnly(last_hidden_state=states)

    ids = torch.full(states.shape[:2], placeholder, device=states.device)
    alone = stack.state.call("the computation of a prompt's logits", is_exclusive=True)
    with alone, stack.state.running(Pass(stack)), patched(stack.module, "forward", forward):
        logits: Tensor = model(input_ids=ids, return_dict=True).logits
    return logits
