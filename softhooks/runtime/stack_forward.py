"""The start of a stack's forward: check the call, and create the pass, which is the object that injects the active prompts.

A stack is the module that runs all layers on the text; an encoder-decoder has two.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.stack import Stack
from softhooks.compat.cache_argument import cache_in
from softhooks.inject.cache_notes import require_own_cache, require_same_prompt, require_unchanged
from softhooks.inject.caches import cache_of
from softhooks.inject.prefix.packed_documents import check_of_documents, document_numbers, require_masks
from softhooks.inject.prefix.paged_cache import paged_cache
from softhooks.inject.reuse import scope_on
from softhooks.inject.text_positions import OuterCall, past_of, row_count, text_shape
from softhooks.runtime.arguments import take
from softhooks.runtime.dispatch import open_pass
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.running_call import Call
from softhooks.runtime.selection import Selection
from softhooks.runtime.servable import require_servable
from softhooks.runtime.with_blocks import Block, generation_of


def begin_stack_forward(prompted: PromptedModel, stack: Stack, call: dict[str, Any]) -> Pass | None:
    """Check a call to a stack, remove its extra arguments, and return its pass, or None if no prompt is active.

    Raises:
        UnsupportedModeError: the active prompts do not support the call, its cache or its packed documents.
    """
    in_use = prompted.is_in_use
    prompted.recompute_check.note(prompted.selection_text if in_use else "none", stack.module.training)
    cache, paged = cache_of(call) if in_use else cache_in(call), paged_cache(call)
    if not in_use:
        require_own_cache(cache, None)
    prompted.refuse_unused(call, stack.parameters)
    given = take(call, prompted.columns)  # some stacks are called directly: `generate` calls an encoder
    if not (in_use or prompted.is_on):
        require_same_prompt(paged, None, None)
        return None
    if paged is not None:
        require_servable(prompted)
    text = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    batch, columns = text.shape[:2] if isinstance(text, Tensor) else (0, 0)
    if stack.features is not None:
        batch = row_count(stack, call)
    forward = prompted.running.forward
    assert forward is not None
    # `select` also checks the length of `rows` against the batch, even if `rows` selects no prompt.
    selection = prompted.select(batch, given or forward.given)
    forward.batch = batch if forward.batch is None else forward.batch
    if not selection.uses:
        return None
    prompted.expected_modules[stack.name].check(stack.module)
    provenance = partial(prompted.provenance, selection)
    if cache is not None:
        require_own_cache(cache, provenance())
    if prompted.freeze_dropout:
        _keep_dropout_off(prompted, stack)
    with scope_on(paged, prompted.model):
        outer = _with_text_mask(_outer_call(forward, stack), stack, call, generation_of(prompted.model))
        opened = _open_for_documents(stack, call, selection, outer, columns)
        if paged is not None and selection.lengths is not None:
            require_unchanged(paged, {prompt: prompt.injected(stack) for prompt in selection.prompts})
        elif paged is not None:
            require_same_prompt(paged, opened, prompted.selection_text)
    opened.provenance = provenance
    return opened


def _open_for_documents(
    stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None, columns: int
) -> Pass:
    """Create the pass, which checks that each document packed into a row attends only to the prompt and to itself."""
    own = call.get("position_ids")
    positions = outer.positions if own is None and outer is not None else own
    packed = document_numbers(positions, call.get("attention_mask"), columns)
    if packed is not None:
        require_masks(stack, packed, by_position=own is not None)
    opened = open_pass(stack, call, selection, outer)  # changes the position ids in the call
    if packed is not None:
        opened.check_attention = check_of_documents(packed)
    return opened


def _keep_dropout_off(prompted: PromptedModel, stack: Stack) -> None:
    """Set the modules of a stack to evaluation mode until the call ends."""
    training = [module for module in stack.module.modules() if module.training]

    def restore() -> None:
        for module in training:
            module.training = True

    call = prompted.running.call
    assert call is not None
    call.restores.append(restore)
    for module in training:
        module.training = False


def _outer_call(forward: Call, stack: Stack) -> OuterCall | None:
    """Return the position ids and the attention mask that the caller passed to the model for this stack."""
    if stack.features is not None:
        return None
    given, prefix = forward.model_arguments, "decoder_" if stack.name == "decoder" else ""
    return (
        None if given is None else OuterCall(given.get(f"{prefix}position_ids"), given.get(f"{prefix}attention_mask"))
    )


def _with_text_mask(
    outer: OuterCall | None, stack: Stack, call: dict[str, Any], generation: Block | None
) -> OuterCall | None:
    """Replace masks that `generate` has prepared for a static cache by the mask of its input, one value per token.

    A prepared mask does not show all padding: that of a sliding layer hides everything before its window.
    """
    mask = None if generation is None else generation.mask
    prepared = isinstance(outer.mask, dict) or getattr(outer.mask, "ndim", 2) == 4 if outer is not None else False
    if mask is None or outer is None or not prepared or stack.name != "text":
        return outer
    batch, columns = text_shape(call)
    if mask.shape[0] != batch:
        return outer
    total = int(past_of(call)) + columns
    return replace(outer, mask=functional.pad(mask[:, :total], (0, max(total - mask.shape[1], 0)), value=1))
