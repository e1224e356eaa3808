"""Check during `attach` whether rows may start with padding.

A model that uses `position_ids` needs no check. In other models, padding before the text may change the output, because they
give positions to padding (ProphetNet, Pegasus-X) or apply the mask of a prefix to the wrong tokens (GIT).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.placeholder_ids import default_id
from softhooks.backbone.probe_inputs import ordinary_ids
from softhooks.backbone.probing import FORWARD_ERRORS, eval_mode, recorded_states
from softhooks.checks.choose_injection import probe_inputs
from softhooks.checks.reaches_output import perturbed_copy
from softhooks.errors import SoftHooksError
from softhooks.prompt import SoftPrompt
from softhooks.runtime.with_blocks import Block

_PADDING = 3


@torch.no_grad()
def takes_left_padding(prompt: SoftPrompt) -> bool:
    """Whether the output with the prompt stays the same when padding is added before the text. False if the model fails.

    True if the output depends on the padding even without a prompt, because then the prompt is not the cause. Also True if
    softhooks refuses such rows with an error of its own.
    """
    if not prompt.structure.embeds_tokens or _takes_positions(prompt):
        return True
    inputs = probe_inputs(prompt)
    pad = default_id(prompt.model, prompt.prompted_model.structure.vocabulary)
    other = next((i for i in ordinary_ids(prompt.model, prompt.prompted_model.structure.entry, 64) if i != pad), pad)
    with eval_mode(prompt.model):
        try:
            with Block(prompt.model, off=True):
                if not _equal(
                    _states(prompt, _padded(inputs, pad), cut=True), _states(prompt, _padded(inputs, other), cut=True)
                ):
                    return True
            with perturbed_copy(prompt, 1.0, 0):
                return _equal(_states(prompt, inputs, cut=False), _states(prompt, _padded(inputs, pad), cut=True))
        except SoftHooksError:
            return True  # these rows are already refused with a specific error
        except FORWARD_ERRORS:
            return False


def _takes_positions(prompt: SoftPrompt) -> bool:
    """Whether each row can have its own positions. False for a prefix in the cache, which some models do not mask correctly."""
    entry = prompt.prompted_model.structure.entry
    positions, table = entry.positions, entry.positions.table
    by_row = positions.takes_position_ids or (table is not None and table.by_row)
    return by_row and (prompt.injection == "slots" or entry.injection != "cache")


def _padded(inputs: dict[str, Tensor], fill: int) -> dict[str, Tensor]:
    values = {"input_ids": fill, "attention_mask": 0}
    return inputs | {name: functional.pad(inputs[name], (_PADDING, 0), value=value) for name, value in values.items()}


def _states(prompt: SoftPrompt, inputs: dict[str, Tensor], cut: bool) -> Tensor:
    """Return the last hidden states of the model's last stack, [.., T, H]; if `cut` is True, leave out those of the padding."""
    structure = prompt.prompted_model.structure
    stack = structure.stacks[-1]
    with recorded_states(stack.module, stack.state) as states, prompt.without_objective():
        prompt.model(**inputs)
    state = states[-1].float()
    return state[:, _PADDING:] if cut and not structure.is_encoder_decoder else state


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference, size = (float(states.square().mean().sqrt()) for states in (one - other, one))
    return difference <= 1e-4 * max(size, 1e-6)
