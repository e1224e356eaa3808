"""Check during `attach` that no head or pooler of an encoder reads a slot's hidden state, for example by its index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import Stack
from softhooks.checks.choose_injection import probe_inputs
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.slots.slot_pass import SlotPass
from softhooks.patching.patches import Patches
from softhooks.prompt import SoftPrompt

_Change = Callable[[Tensor, int], Tensor]


def check_unread(prompt: SoftPrompt) -> None:
    """Change the hidden states of slots after the last layer, and check that the model's output does not change.

    Only encoders are checked: in a decoder, the last slot predicts the next token; in an encoder-decoder, the decoder attends to
    slots.
    """
    stack = prompt.prompted_model.structure.entry
    if prompt.injection != "slots" or stack.causal or stack.name != "text":
        return
    with eval_mode(prompt.model):
        with _watched(stack, lambda states, _number: states) as calls:
            answer = _answer(prompt)
        if not calls:
            return  # no layer returns a state for each token and slot; the stack's output is checked when slots are removed
        with _watched(stack, lambda states, number: _disturbed(stack, states) if number == len(calls) else states):
            other = _answer(prompt)
    changed = [name for name, values in answer.items() if not torch.allclose(values, other[name], rtol=1e-4, atol=1e-5)]
    if changed:
        raise UnsupportedMethodError(
            f"{', '.join(changed)} depends on the hidden state of a slot; a head or pooler must not read virtual tokens.",
            "Use another placement, such as placement='after_first', or a method with keys and values, such as PrefixTuning.",
            model=type(prompt.model).__name__,
            placement=prompt.layout.form.placement,
        )


def _answer(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Return the floating-point tensors in the model's output by name, without tuples such as `hidden_states`."""
    with prompt.without_objective():
        output: Any = prompt.model(**probe_inputs(prompt))
    named = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    return {
        f"`{name}`": value.float() for name, value in named if isinstance(value, Tensor) and value.is_floating_point()
    }


@contextmanager
def _watched(stack: Stack, change: _Change) -> Iterator[list[nn.Module]]:
    """Record the calls of layers that return a state for each token and each slot, and change these states.

    Args:
        change: called with the states and the number of the call, counting from 1; returns the new states.
    """
    called: list[nn.Module] = []

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) and output else output
        forward_pass = stack.state.current
        if not isinstance(forward_pass, SlotPass) or not isinstance(states, Tensor) or states.dim() != 3:
            return None
        if forward_pass.wide is None or states.shape[1] != forward_pass.wide.columns:
            return None
        called.append(module)
        changed = change(states, len(called))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layers = {part for holder in stack.module.modules() if isinstance(holder, nn.ModuleList) for part in holder}
    with Patches() as patches:
        for layer in layers:
            patches.keep(layer.register_forward_hook(after))
        yield called


def _disturbed(stack: Stack, states: Tensor) -> Tensor:
    forward_pass = stack.state.current
    assert isinstance(forward_pass, SlotPass)
    assert forward_pass.wide is not None
    index = forward_pass.wide.slots.expand(states.shape[0], -1)[..., None].expand(-1, -1, states.shape[2])
    noise = torch.linspace(-1, 1, states.shape[2], device=states.device) * states.float().abs().amax().clamp(min=1.0)
    return states.scatter(1, index, noise.to(states).expand_as(index).contiguous())
