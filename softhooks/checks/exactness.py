"""Whether a front prompt that is computed once gives what the prompt in the sequence gives, found by running both."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import as_choices, probe_ids, probe_length
from softhooks.backbone.probing import eval_mode, last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.errors import SoftHooksError
from softhooks.runtime.contexts import Block

if TYPE_CHECKING:
    from softhooks.prompt import SoftPrompt
    from softhooks.runtime.attached_prompt import Injection

_PADDED = 3
_WAYS: tuple[Injection, Injection] = ("shared", "slots")
_FAILURES = (SoftHooksError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


def shares_exactly(prompt: SoftPrompt) -> bool:
    """Compare a prompt computed once with the prompt in the sequence, on rows of text, padded on either side too.

    The text is longer than the short windows and chunks that the model has, so that they count. The difference is held against
    the precision of the states, and against what the prompt changes at all. What cannot be compared is not exact.
    """
    stack = prompt.prompted_model.structure.entry
    if _looks_far(stack):
        return False
    call = _call(prompt, stack)
    shared = _states(prompt, "shared", call)
    plain = None if shared is None else _states(prompt, "slots", call)
    is_alone = shared is not None and plain is None
    if is_alone:  # a model around the stack makes masks that slots cannot widen
        shared, plain = (_states(prompt, way, call, alone=True) for way in _WAYS)
    if shared is None or plain is None:
        return False
    real, precision = call["attention_mask"].flatten(0, -2).bool(), _precision(stack)
    shared, plain = shared[real].float(), plain[real].float()
    if _is_rounding(shared, plain, precision):
        return True
    without = _states(prompt, None, call, alone=is_alone)
    return without is not None and agree(shared, plain, without[real].float(), precision)


def agree(ours: Tensor, theirs: Tensor, without: Tensor, precision: float) -> bool:
    """Whether two results are one, up to rounding.

    Args:
        without: what comes out where there is no prompt: a difference that is as large as the prompt's effect is no rounding.
        precision: of the numbers that the states were computed in.
    """
    if not _are_finite(ours, theirs):
        return False
    if _is_rounding(ours, theirs, precision):
        return True
    worst = (ours - theirs).abs().amax() / theirs.abs().amax().clamp(min=1e-6)
    return bool(worst <= 200 * precision**0.9) and _size(ours - theirs) <= 0.05 * _size(theirs - without)


def _is_rounding(ours: Tensor, theirs: Tensor, precision: float) -> bool:
    """Whether a difference is that of the order of a sum, however little the prompt changes."""
    return _are_finite(ours, theirs) and _size(ours - theirs) <= 4 * precision * _size(theirs)


def _are_finite(*states: Tensor) -> bool:
    return all(bool(one.isfinite().all()) for one in states)


def _size(states: Tensor) -> float:
    return float(states.square().mean().sqrt())


def _precision(stack: Stack) -> float:
    dtype = next((p.dtype for p in stack.module.parameters() if p.is_floating_point()), torch.float32)
    return torch.finfo(dtype).eps


def _looks_far(stack: Stack) -> bool:
    """Whether the config names something that groups or selects tokens over more columns than a probe has.

    Chunks are cut where the text's own columns are, and keys are selected among the text's own.
    """
    config: Any = getattr(stack.module, "config", None)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    selects = isinstance(getattr(config, "index_topk", None), int)
    return chunked or selects


def _call(prompt: SoftPrompt, stack: Stack) -> dict[str, Tensor]:
    """Three rows, of which the second ends in padding and the third begins with it."""
    positions, length = stack.positions, prompt.layout.columns
    rooms = [room for room in (positions.limit, positions.trained, positions.changes) if room is not None]
    columns, _ = probe_length(stack.module, min(rooms) - length if rooms else None, length)
    rows = [probe_ids(prompt.model, prompt.prompted_model.structure.vocabulary, columns, seed) for seed in (0, 1, 2)]
    ids = torch.cat(rows)
    mask = torch.ones_like(ids)
    mask[1, max(columns - _PADDED, 1) :] = 0
    mask[2, : min(_PADDED, columns - 1)] = 0
    extra = {name: torch.cat([value] * 3) for name, value in prompt.method.probe_arguments().items()}
    choices = prompt.prompted_model.structure.choices
    if choices is not None:
        ids, mask = as_choices(ids, choices), as_choices(mask, choices)
    return {"input_ids": ids, "attention_mask": mask, **extra}


def _states(
    prompt: SoftPrompt, injection: Injection | None, call: dict[str, Tensor], alone: bool = False
) -> Tensor | None:
    """The stack's last states in a call with one way in, or without the prompt; None where that fails.

    Args:
        alone: call the stack itself, not the model around it.
    """
    kept: list[Tensor] = []
    prompted, stack = prompt.prompted_model, prompt.prompted_model.structure.entry

    def begin(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if stack.state.current is None:
            given = dict(zip(stack.parameters, args, strict=False)) | kwargs
            stack.proven = {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str))}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if stack.state.current is None:  # not the prompt's own rows
            kept.append(last_hidden_state(output))

    before = prompt.injection, prompt.requires_sharing
    handles = [stack.module.register_forward_hook(keep)]
    if injection == "shared" and not alone:  # before the prompt's own hook, which changes the call
        handles.append(stack.module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
    if injection is None:
        call = {name: value for name, value in call.items() if name not in prompted.columns}
    else:
        prompt.injection, prompt.requires_sharing = injection, injection == "shared"
    try:
        with eval_mode(prompt.model), Block(prompt.model, off=True) if injection is None else nullcontext():
            (stack.module if alone else prompt.model)(**call)
    except _FAILURES:
        return None
    finally:
        for handle in handles:
            handle.remove()
        prompt.injection, prompt.requires_sharing = before
    return kept[-1]
