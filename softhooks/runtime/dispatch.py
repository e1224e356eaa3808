"""Choose how prompts enter a forward of a stack: as slots, as keys and values, or as a gated branch.

A stack is the module that runs all layers on the text; an encoder-decoder has two. A slot is a place for a virtual token in the
sequence. A pass is the object that injects the prompts into one forward of a stack.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.stack import Role, Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.branch.branch import CONTEXT, Branch, BranchPass, mix_branches
from softhooks.inject.branch.linear_scaling import blanks
from softhooks.inject.branch.request_branches import join_branches
from softhooks.inject.checkpointing import UnchangedPass
from softhooks.inject.prefix.cache_pass import CachePass
from softhooks.inject.prefix.key_values import KeyValues, mix
from softhooks.inject.prefix.prefix_pass import PrefixPass
from softhooks.inject.prefix.request_prefixes import join_prefixes
from softhooks.inject.shared_prompt import always_shared_error, reasons_against_sharing, slots_error
from softhooks.inject.shift_positions import needs_position_ids, shift_positions
from softhooks.inject.slots.cross_attention import CrossSlotPass
from softhooks.inject.slots.refused_calls import has_positions_in_types, refuse_moved_indices
from softhooks.inject.slots.slot_pass import FallbackPass, SlotPass
from softhooks.inject.slots.slot_tables import Slots
from softhooks.inject.text_positions import (
    OuterCall,
    check_text_length,
    later_start,
    later_start_error,
    order_in_text,
    padding_mask,
    past_of,
    positions_in_text,
    prepared_mask,
    row_count,
    text_shape,
)
from softhooks.runtime.selection import Selection
from softhooks.runtime.with_blocks import generation_of

_FIRST_POSITIONS = ("attention", "written_out", "cache")
"""The injections whose keys and values occupy the first positions, so the text must start right after them."""


def open_pass(stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None = None) -> Pass:
    """Create the pass for one forward of a stack, and change the call's arguments in place.

    Args:
        outer: the position ids and attention mask of the model's call, or None if the stack is called directly.

    Raises:
        UnsupportedModeError: the prompts cannot share a batch, or do not support this call.
    """
    prompts = selection.prompts
    if stack is prompts[0].structure.entry and not all(prompt.takes_left_padding for prompt in prompts):
        _refuse_left_padding(stack, padding_mask(call, outer))
    if any(prompt.injection == "branch" for prompt in prompts):
        return _open_branch(stack, call, selection, outer)
    reasons = _reasons_for_slots(stack, call, selection, outer)
    as_slots = [prompt.injection == "slots" or bool(found) for prompt, found in zip(prompts, reasons, strict=True)]
    if len(set(as_slots)) == 2:
        raise UnsupportedModeError(
            "this batch mixes slots with keys and values; its prompts must all enter as slots, or all as keys and values.",
            "Attach all with the same `injection=`, or run their rows in separate batches.",
            prompts=", ".join(
                f"{p.name}: {'slots' if slots else p.injection}" for p, slots in zip(prompts, as_slots, strict=True)
            ),
        )
    if not as_slots[0]:
        return _open_prefix(stack, call, selection, outer)
    fallback = next((found for found in reasons if found), [])
    if not fallback:
        return _open_slots(stack, call, selection, outer)
    try:
        return _open_slots(stack, call, selection, outer, is_fallback=True)
    except UnsupportedModeError as error:
        raise slots_error(fallback, error) from error


def _reasons_for_slots(
    stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None
) -> list[list[str]]:
    """For each prompt, return the arguments of the call that force it to enter as slots."""
    moved = later_start(stack, call, outer)
    fixed = [prompt for prompt in selection.prompts if prompt.injection in _FIRST_POSITIONS]
    if moved and any(prompt.conventions.get("shift_positions", True) for prompt in fixed):
        raise later_start_error(stack, moved)
    reasons: list[list[str]] = []
    for prompt in selection.prompts:
        found: list[str] = []
        if prompt.injection == "shared":
            found = reasons_against_sharing(stack, call, prompt.layout.num_slots) + ([moved] if moved else [])
        if found and prompt.requires_sharing:
            raise always_shared_error(prompt.name, found)
        reasons.append(found)
    return reasons


def _refuse_left_padding(stack: Stack, mask: Tensor | None) -> None:
    if mask is not None and not bool(mask[:, 0].all()):
        raise UnsupportedModeError(
            f"{int((mask[:, 0] == 0).sum())} rows begin with padding, but with a prompt the output of "
            f"{type(stack.module).__name__} depends on padding before the text.",
            "Pad on the right, or batch rows of the same length, without padding.",
        )


# --- slots ------------------------------------------------------------------------------------------------------------


def _open_slots(
    stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None, is_fallback: bool = False
) -> Pass:
    slots, first = _slots_of(stack, selection), selection.prompts[0]
    if stack.name == "decoder":
        return CrossSlotPass(stack, first.structure.entry, slots, call)
    if selection.hidden(text_shape(call)[0], slots.columns) is not None:
        raise UnsupportedModeError(
            "the prompt hides virtual tokens from some rows but enters as slots; only keys and values can be hidden.",
            "Use a causal decoder, in which the prompt enters as keys and values (see `prompt.injection`).",
        )
    check_text_length(stack, call, slots.columns, cached=slots.columns, outer=outer)
    if is_fallback:
        opened = FallbackPass(stack, slots, call, first.placeholder_id, outer=outer)
        if stack.module.training:
            opened.follow_checkpointing()
        return opened
    return SlotPass(stack, slots, call, first.placeholder_id, keep=stack.name == "encoder", outer=outer)


def _slots_of(stack: Stack, selection: Selection) -> Slots:
    """Compute the embeddings of a batch's prompts, and return them as slots."""
    tables = [use.prompt.embeddings(use.variant) for use in selection.uses]
    layouts = [use.prompt.layout for use in selection.uses]
    ids = [use.prompt.placeholder_ids for use in selection.uses] if stack.reads_ids else None
    generation = generation_of(selection.prompts[0].model) if stack.name == "text" else None
    searched = None if generation is None else generation.prompt_columns
    return Slots(tables, layouts, selection.rows, selection.given, searched, ids)


# --- keys and values --------------------------------------------------------------------------------------------------


def _open_prefix(stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None) -> Pass:
    prefixes = _prefixes_of(stack, call, selection)
    if not prefixes:
        return UnchangedPass(stack)
    own = prefixes["self"]
    shift = own.shift()
    before = shift if own.requests is not None else own.length if own.shifted is not False else 0
    check_text_length(stack, call, before, outer=outer)
    positions: Tensor | None = None
    in_table: Tensor | None = None
    if isinstance(shift, Tensor) or shift:
        refuse_moved_indices(call, "a prefix with `shift_positions=True` changes these indices")
    in_types = has_positions_in_types(call, padding_mask(call, outer), moved=isinstance(shift, Tensor) or shift != 0)
    if needs_position_ids(stack, shift) and not in_types:
        positions = positions_in_text(stack, call, outer)
        in_table = shift_positions(stack, call, shift, positions, padding_mask(call, outer))
    opened: PrefixPass
    if stack.injection == "cache":
        opened = CachePass(stack, own, call, text_shape(call))
    else:
        opened = PrefixPass(stack, prefixes, order_in_text(positions, call, outer), stack.module.training)
    opened.table_positions = in_table
    return opened


def _prefixes_of(stack: Stack, call: dict[str, Any], selection: Selection) -> dict[Role, KeyValues]:
    """Compute the keys and values of a batch's prompts, for self- and cross-attention; empty if they do not enter this stack."""
    each = [prompt.key_values(stack, variants) for prompt, variants in selection.by_prompt()]
    if selection.rows is not None and selection.lengths is not None:
        return {"self": join_prefixes([kv["self"] for kv in each], selection.rows, selection.lengths)}
    prefixes: dict[Role, KeyValues] = {}
    roles: list[Role] = ["self", "cross"]
    for role in roles:
        if role in each[0]:
            own = each[0][role] if selection.rows is None else mix([kv[role] for kv in each], selection.rows)
            prefixes[role] = replace(own, hidden=selection.hidden(row_count(stack, call), own.length))
    return prefixes


# --- a gated branch ---------------------------------------------------------------------------------------------------


def _open_branch(stack: Stack, call: dict[str, Any], selection: Selection, outer: OuterCall | None) -> Pass:
    """Create the pass for a gated branch. Padding at the start of a row does not shift the position ids of its text."""
    branch = BranchPass(stack, _branch_of(stack, selection, row_count(stack, call)), stack.module.training)
    if stack.features is not None:
        return branch
    _, columns = text_shape(call)
    mask = padding_mask(call, outer)
    if branch.branch.scaled:
        branch.blank = blanks(mask, columns)
    by_caller = stack.positions.takes_position_ids and (outer is None or outer.positions is not None)
    if mask is None and (prepared_mask(call) is None or call.get("position_ids") is not None):
        return branch
    if not needs_position_ids(stack, 0) or (by_caller and call.get("position_ids") is not None):
        return branch
    if has_positions_in_types(call, mask):
        return branch
    positions = positions_in_text(stack, call, outer)
    if mask is not None and positions.dim() == 2:
        # Padding keeps the position ids that it has without a prompt.
        own = torch.arange(columns, device=mask.device) + past_of(call)
        positions = torch.where(mask[:, -columns:] == 0, own, positions)
    branch.table_positions = shift_positions(stack, call, 0, positions, mask)
    return branch


def _branch_of(stack: Stack, selection: Selection, batch: int) -> Branch:
    """Compute the gated branch of a batch."""
    prompts = selection.prompts
    if selection.rows is not None and selection.lengths is not None:
        return join_branches([prompt.branch(stack, None) for prompt in prompts], selection.rows, selection.lengths)
    if any(prompt.injection != "branch" for prompt in prompts):
        raise UnsupportedModeError(
            "this batch mixes a gated branch with a prompt of a different injection; they cannot share a batch.",
            "Run their rows in separate batches.",
            prompts=", ".join(f"{prompt.name}: {prompt.injection}" for prompt in prompts),
        )
    context = selection.given.get(CONTEXT)
    if context is not None and context.shape[0] != batch:
        raise UnsupportedModeError(
            f"`{CONTEXT}` has length {context.shape[0]} for a batch of {batch} rows; it must have one entry for each row.",
            f"Pass one context for each row in `{CONTEXT}`, in the order of the rows.",
        )
    choice = selection.choice_of_prompts()
    if choice is None:
        return prompts[0].branch(stack, context)
    rows = [tuple(row for row, chosen in enumerate(choice) if chosen == i) for i in range(len(prompts))]
    branches = [prompt.branch(stack, context, own) for prompt, own in zip(prompts, rows, strict=True)]
    if any(branch.pending for branch in branches):
        raise UnsupportedModeError(
            "the rows of this batch use different gated branches; in a sharded model (FSDP) all rows must use one branch.",
            "Run the rows of each prompt in separate batches.",
            prompts=", ".join(prompt.name for prompt in prompts),
        )
    return mix_branches(branches, rows, batch)
