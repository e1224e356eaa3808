"""Check during `attach` that a model computes the same hidden states with injection "shared" as with "slots"."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import probe_ids, probe_length
from softhooks.backbone.probing import FORWARD_ERRORS, eval_mode, float_dtype, recorded_states, relative_difference
from softhooks.backbone.stack import Stack
from softhooks.errors import SoftHooksError
from softhooks.patching.patches import Patches
from softhooks.prompt import SoftPrompt
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.with_blocks import Block

_PADDED = 3


def shares_exactly(prompt: SoftPrompt) -> bool:
    """Whether both injections give the same states, in rows with and without padding. False if a forward pass fails.

    The text is longer than the model's short attention windows and chunks, so that they take effect.
    """
    stack = prompt.prompted_model.structure.entry
    if _exceeds_probe(stack):
        return False
    call = _call(prompt, stack)
    shared = _states(prompt, "shared", call)
    plain = None if shared is None else _states(prompt, "slots", call)
    is_alone = shared is not None and plain is None
    if is_alone:  # "slots" cannot widen masks that the outer model makes, so compare only the stack
        shared, plain = _states(prompt, "shared", call, alone=True), _states(prompt, "slots", call, alone=True)
    if shared is None or plain is None:
        return False
    real, precision = call["attention_mask"].flatten(0, -2).bool(), torch.finfo(float_dtype(stack.module)).eps
    shared, plain = shared[real].float(), plain[real].float()
    if _is_rounding(shared, plain, precision):
        return True
    without = _states(prompt, None, call, alone=is_alone)
    return without is not None and agree(shared, plain, without[real].float(), precision)


def agree(ours: Tensor, theirs: Tensor, without: Tensor, precision: float) -> bool:
    """Whether the states of two injections are equal up to rounding.

    Args:
        without: the states without a prompt; a difference that is large compared to the prompt's effect is not rounding.
        precision: the machine epsilon of the states' dtype.
    """
    if not _are_finite(ours, theirs):
        return False
    if _is_rounding(ours, theirs, precision):
        return True
    return relative_difference(ours, theirs) <= 200 * precision**0.9 and _size(ours - theirs) <= 0.05 * _size(
        theirs - without
    )


def _is_rounding(ours: Tensor, theirs: Tensor, precision: float) -> bool:
    """Whether a difference is small enough to come from summing in a different order."""
    return _are_finite(ours, theirs) and _size(ours - theirs) <= 4 * precision * _size(theirs)


def _are_finite(*states: Tensor) -> bool:
    return all(bool(one.isfinite().all()) for one in states)


def _size(states: Tensor) -> float:
    return float(states.square().mean().sqrt())


def _exceeds_probe(stack: Stack) -> bool:
    """Whether attention is divided into chunks or limited to selected keys; the check's inputs are too short to show either."""
    config: Any = getattr(stack.module, "config", None)
    is_chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return is_chunked or isinstance(getattr(config, "index_topk", None), int)


def _call(prompt: SoftPrompt, stack: Stack) -> dict[str, Tensor]:
    """Return the arguments of a forward pass on three rows: one without padding, one padded on the right, one on the left."""
    positions, length = stack.positions, prompt.layout.num_slots
    limits = [
        limit for limit in (positions.limit, positions.trained, positions.dynamic_rope_length) if limit is not None
    ]
    columns, _ = probe_length(stack.module, min(limits) - length if limits else None, length)
    rows = [probe_ids(prompt.model, prompt.prompted_model.structure.vocabulary, columns, seed) for seed in (0, 1, 2)]
    ids = torch.cat(rows)
    mask = torch.ones_like(ids)
    mask[1, max(columns - _PADDED, 1) :] = 0
    mask[2, : min(_PADDED, columns - 1)] = 0
    extra = {name: torch.cat([value] * 3) for name, value in prompt.method.probe_arguments().items()}
    return {**prompt.prompted_model.structure.example.arguments(ids, mask), **extra}


def _states(
    prompt: SoftPrompt, injection: Injection | None, call: dict[str, Tensor], alone: bool = False
) -> Tensor | None:
    """Return the stack's last hidden states, or None if the forward pass fails.

    Args:
        injection: None to run without the prompt.
        alone: whether to call the stack itself instead of the whole model.
    """
    prompted, stack = prompt.prompted_model, prompt.prompted_model.structure.entry

    def note_arguments(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if stack.state.current is None:
            given = dict(zip(stack.parameters, args, strict=False)) | kwargs
            stack.compared_arguments = {
                name: value for name, value in given.items() if isinstance(value, (bool, int, float, str))
            }

    with Patches() as patches:
        if injection == "shared" and not alone:  # runs before the prompt's own hook, which changes the arguments
            hook = stack.module.register_forward_pre_hook(note_arguments, with_kwargs=True, prepend=True)
            patches.keep(hook)
        if injection is None:
            call = {name: value for name, value in call.items() if name not in prompted.columns}
        else:
            patches.set(prompt, "injection", injection)
            patches.set(prompt, "requires_sharing", injection == "shared")
        off = Block(prompt.model, off=True) if injection is None else nullcontext()
        text_states = recorded_states(stack.module, stack.state)
        with eval_mode(prompt.model), off, text_states as states:
            try:
                (stack.module if alone else prompt.model)(**call)
            except (SoftHooksError, *FORWARD_ERRORS):
                return None
    return states[-1]
