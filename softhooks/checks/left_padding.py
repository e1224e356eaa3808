"""Whether rows may begin with padding, found by running a text with padding before it, and without.

A model that is told where each row's text stands needs no such run. Others count columns, padding too (ProphetNet, Pegasus-X), or
lay the mask of a prefix over other columns (GIT): the same text would get another answer behind other padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.placeholder_ids import usual_id
from softhooks.backbone.probe_inputs import ordinary_ids
from softhooks.backbone.probing import eval_mode, last_hidden_state
from softhooks.checks.injection import probe_inputs
from softhooks.checks.reach import standing_in
from softhooks.errors import SoftHooksError
from softhooks.prompt import SoftPrompt
from softhooks.runtime.contexts import Block

_PADDING = 3
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


@torch.no_grad()
def takes_left_padding(prompt: SoftPrompt) -> bool:
    """Whether padding before a text, told by the mask, leaves the answer with a prompt as it is; what fails does not.

    A model that reads padding whatever the mask says does so without a prompt too: then nothing is refused that it takes bare.
    """
    if _is_told(prompt):
        return True
    inputs = probe_inputs(prompt)
    pad = usual_id(prompt.model, prompt.prompted_model.structure.vocabulary)
    other = next((i for i in ordinary_ids(prompt.model, prompt.prompted_model.structure.entry, 64) if i != pad), pad)
    with eval_mode(prompt.model):
        try:
            with Block(prompt.model, off=True):
                if not _equal(
                    _states(prompt, _padded(inputs, pad), cut=True), _states(prompt, _padded(inputs, other), cut=True)
                ):
                    return True
            with standing_in(prompt, 1.0, 0):
                return _equal(_states(prompt, inputs, cut=False), _states(prompt, _padded(inputs, pad), cut=True))
        except SoftHooksError:
            return True  # such rows are refused by name already
        except _FAILURES:
            return False


def _is_told(prompt: SoftPrompt) -> bool:
    """Whether the stack is told by row where its text stands, and no cache takes columns that its masks may not know of."""
    entry = prompt.prompted_model.structure.entry
    positions, table = entry.positions, entry.positions.table
    by_row = positions.argument or (table is not None and table.by_row)
    return by_row and (prompt.injection == "slots" or entry.injection != "cache")


def _padded(inputs: dict[str, Tensor], fill: int) -> dict[str, Tensor]:
    values = {"input_ids": fill, "attention_mask": 0}
    return inputs | {name: functional.pad(inputs[name], (_PADDING, 0), value=value) for name, value in values.items()}


def _states(prompt: SoftPrompt, inputs: dict[str, Tensor], cut: bool) -> Tensor:
    """The last stack's states of the text, [.., T, H]."""
    kept: list[Tensor] = []
    structure = prompt.prompted_model.structure
    stack = structure.stacks[-1]
    outer = stack.state.current

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if stack.state.current is outer:  # not the prompt's own rows
            kept.append(last_hidden_state(output).float())

    handle = stack.module.register_forward_hook(keep)
    try:
        with prompt.without_objective():
            prompt.model(**inputs)
    finally:
        handle.remove()
    return kept[-1][:, _PADDING:] if cut and not structure.is_encoder_decoder else kept[-1]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference, size = (float(states.square().mean().sqrt()) for states in (one - other, one))
    return difference <= 1e-4 * max(size, 1e-6)
