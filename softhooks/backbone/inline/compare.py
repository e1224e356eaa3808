"""Compare the rewritten forward of attention modules with their own, while their stack runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.attention_function import inline_attention
from softhooks.backbone.inline.families import MORE_CALLS
from softhooks.backbone.inline.rewritten_forward import argument_names, family_of, rewritten_forward
from softhooks.backbone.probing import FORWARD_ERRORS, are_close, seeded
from softhooks.patching.patches import Patches


@contextmanager
def compared_forwards(stack: nn.Module, attention: AttentionFunction) -> Iterator[list[nn.Module]]:
    """While the `with` block runs, compute each forward of the stack's inline attention modules in both ways.

    Each call is also repeated in training mode, with attention weights, and as the family's `MORE_CALLS` change it, so that
    dropout and everything that a module may return are compared too.

    Args:
        attention: called instead of `inline_attention` in each forward that the stack itself makes.

    Yields:
        the modules whose results differ, or could not be compared; softhooks does not support these modules.
    """
    differing: list[nn.Module] = []
    with Patches() as patches:
        for module in stack.modules():
            if family_of(module) is None:
                continue
            if "forward" in module.__dict__:  # a prompt, or another library, has replaced it
                differing.append(module)
            else:
                patches.set(module, "forward", functools.partial(_run_both, module, attention, differing))
        yield differing


def _run_both(
    module: nn.Module, attention: AttentionFunction, differing: list[nn.Module], *args: Any, **kwargs: Any
) -> Any:
    call = dict(zip(argument_names(module), args, strict=False)) | kwargs
    family = family_of(module)
    more = [MORE_CALLS[family](call)] if family in MORE_CALLS else []
    if "output_attentions" in argument_names(module):
        more.append({**call, "output_attentions": True})
    checks = [agree(module, other, training, _attention) for other in (call, *more) for training in (False, True)]
    if not all(checks) or not agree(module, call, False, attention):
        differing.append(module)
    return type(module).forward(module, *args, **kwargs)


def _attention(*parts: Any, function: AttentionFunction = inline_attention, **options: Any) -> Any:
    return function(*parts, **options)


def agree(module: nn.Module, call: dict[str, Any], training: bool, attention: AttentionFunction) -> bool:
    """Whether both forwards return the same, with the same random numbers."""
    rewritten = rewritten_forward(module)
    with Patches() as patches, suppress(*FORWARD_ERRORS):
        for part in module.modules():
            patches.set(part, "training", training)
        with seeded(module):
            expected = _tensors(type(module).forward(module, **_with_own_cache(call)))
        with seeded(module):
            found = _tensors(rewritten((), _with_own_cache(call), attention) if rewritten is not None else None)
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    return False


def _with_own_cache(call: dict[str, Any]) -> dict[str, Any]:
    """Copy the caches among the arguments, because a forward writes to them."""
    return {name: copy.deepcopy(value) if hasattr(value, "get_seq_length") else value for name, value in call.items()}


def _tensors(output: Any) -> list[Tensor | None]:
    """List the tensors in the output of an attention module, with None for None; caches are left out."""
    if output is None or isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _is_same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.shape == expected.shape and found.dtype == expected.dtype and are_close(found, expected)


def masked_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add an attention mask to the arguments of a stack that hides the last token."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0
    return {**inputs, "attention_mask": mask}
