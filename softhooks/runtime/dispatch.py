"""Choose and open the pass of a forward: by the prompts in use, the stack, and the call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.max_positions import warn_beyond
from softhooks.backbone.position_table import place_at_table
from softhooks.backbone.stack import Role, Stack
from softhooks.errors import PromptTooLongError, UnsupportedModeError
from softhooks.inject.branch.branch import open_branch
from softhooks.inject.branch.linear_scaling import blanks
from softhooks.inject.call_inputs import reaching
from softhooks.inject.prefix.attention import PrefixPass
from softhooks.inject.prefix.cache import CachePass
from softhooks.inject.prefix.key_values import KeyValues, mix
from softhooks.inject.prefix.paged import longest_text
from softhooks.inject.slots.cross_attention import CrossSlotPass
from softhooks.inject.slots.fallback import FallbackPass, refusal, require_sharing
from softhooks.inject.slots.rows import Slots
from softhooks.inject.slots.slots import SlotPass
from softhooks.inject.start_position import refuse_elsewhere, starts_elsewhere
from softhooks.inject.text_position import Outer, order_in_text, padding_mask, past_of, positions_in_text, text_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from softhooks.prompt import SoftPrompt
    from softhooks.runtime.selection import Selection


def open_pass(
    stack: Stack, call: dict[str, Any], selection: Selection, placeholder: int, outer: Outer | None = None
) -> Pass:
    """Open the pass for one forward of a stack; the call's arguments are changed in place.

    Args:
        selection: the prompts in use, and which row meets which.
        placeholder: an ordinary id for slots.
        outer: what the call of the model brought; None where the stack is called by itself.

    Raises:
        UnsupportedModeError: the prompts or the call cannot be served together.
    """
    prompts = selection.prompts
    if stack is prompts[0].prompted_model.structure.entry and not all(prompt.takes_left_padding for prompt in prompts):
        _refuse_left_padding(stack, padding_mask(call, outer))
    if any(prompt.injection == "branch" for prompt in prompts):
        return _open_branch(stack, call, selection, outer)
    reached = _reached(stack, call, prompts, outer)
    in_sequence = {prompt: prompt.injection == "slots" or bool(reached[prompt]) for prompt in prompts}
    if set(in_sequence.values()) == {True, False}:
        raise UnsupportedModeError(
            "prompts in one batch must all enter as slots, or all as keys and values.",
            "Attach them with one `injection=`, or run their rows in batches of their own.",
            prompts=", ".join(
                f"{prompt.name}: {'slots' if slots else prompt.injection}" for prompt, slots in in_sequence.items()
            ),
        )
    fallen_back = next((names for names in reached.values() if names), [])
    if not in_sequence[prompts[0]]:
        return _open_prefix(stack, call, selection, outer)
    if not fallen_back:
        return _open_slots(stack, call, selection, placeholder, outer)
    try:
        return _open_slots(stack, call, selection, placeholder, outer, is_fallback=True)
    except UnsupportedModeError as error:
        raise refusal(fallen_back, error) from error


def _reached(
    stack: Stack, call: dict[str, Any], prompts: Sequence[SoftPrompt], outer: Outer | None
) -> dict[SoftPrompt, list[str]]:
    """What in the call could change the states of each prompt that is computed once as a rule."""
    refuse_elsewhere(stack, moved := starts_elsewhere(stack, call, outer), prompts)
    found = {
        prompt: reaching(stack, call, prompt.layout.columns) + ([moved] if moved else [])
        if prompt.injection == "shared"
        else []
        for prompt in prompts
    }
    for prompt, names in found.items():
        if names and prompt.shares_always:
            require_sharing(prompt.name, names)
    return found


# --- slots ------------------------------------------------------------------------------------------------------------


def _slots_of(stack: Stack, selection: Selection) -> Slots:
    """The prompts in use, as slots."""
    tables = [use.prompt.embeddings(use.variant) for use in selection.uses]
    layouts = [use.prompt.layout for use in selection.uses]
    ids = [use.prompt.placeholder for use in selection.uses] if stack.reads_ids else None
    searched = selection.prompts[0].prompted_model.prompt_columns if stack.name == "text" else None
    return Slots(tables, layouts, selection.rows, selection.given, searched, ids)


def _open_slots(
    stack: Stack,
    call: dict[str, Any],
    selection: Selection,
    placeholder: int,
    outer: Outer | None,
    is_fallback: bool = False,
) -> Pass:
    slots = _slots_of(stack, selection)
    if stack.name == "decoder":
        return CrossSlotPass(stack, selection.prompts[0].prompted_model.structure.entry, slots, call)
    if selection.hidden(text_shape(call)[0], slots.columns) is not None:
        raise UnsupportedModeError(
            "virtual tokens can be hidden from some rows only where they enter as keys and values.",
            "Use a causal decoder whose prompt is computed once (`prompt.injection`).",
            injection="slots",
        )
    check_length(stack, call, slots.columns, cached=slots.columns, outer=outer)
    if is_fallback:
        return FallbackPass(stack, slots, call, placeholder, outer=outer)
    return SlotPass(stack, slots, call, placeholder, keep=stack.name == "encoder", outer=outer)


# --- a gated branch ---------------------------------------------------------------------------------------------------


def _open_branch(stack: Stack, call: dict[str, Any], selection: Selection, outer: Outer | None) -> Pass:
    """Open a branch; a text behind padding stands where it would stand alone, for queries know their absolute positions."""
    batch, columns = text_shape(call)
    opened = open_branch(stack, selection, batch)
    mask = padding_mask(call, outer)
    if opened.branch.scaled:
        opened.blank = blanks(mask, columns)
    by_caller = stack.positions.argument and (outer is None or outer.positions is not None)
    if mask is None or not _takes_positions(stack, 0) or (by_caller and call.get("position_ids") is not None):
        return opened
    positions = positions_in_text(stack, call, outer)
    if positions.dim() == 2:
        own = torch.arange(columns, device=mask.device) + past_of(call)
        positions = torch.where(mask[:, -columns:] == 0, own, positions)
    try:
        _move_positions(stack, call, 0, positions, mask, opened.handles)
    except BaseException:
        opened.close()
        raise
    return opened


# --- keys and values --------------------------------------------------------------------------------------------------


def _open_prefix(stack: Stack, call: dict[str, Any], selection: Selection, outer: Outer | None) -> Pass:
    rows = selection.rows
    each = [prompt.key_values(stack, variants) for prompt, variants in selection.by_prompt()]
    roles: list[Role] = ["self", "cross"]
    prefixes: dict[Role, KeyValues] = {}
    for role in roles:
        if role in each[0]:
            own = each[0][role] if rows is None else mix([kv[role] for kv in each], rows)
            prefixes[role] = replace(own, hidden=selection.hidden(text_shape(call)[0], own.length))
    if not prefixes:
        return _Untouched(stack)
    own = prefixes["self"]
    batch, columns = text_shape(call)
    check_length(stack, call, own.length if own.shifted is not False else 0, outer=outer)
    mask = padding_mask(call, outer)
    positions = positions_in_text(stack, call, outer) if _takes_positions(stack, own.shift()) else None
    handles: list[Any] = []
    if positions is not None:
        _move_positions(stack, call, own.shift(), positions, mask, handles)
    opened: PrefixPass
    try:
        if stack.through == "cache":
            opened = CachePass(stack, own, call, (batch, columns))
        else:
            opened = PrefixPass(stack, prefixes, order_in_text(positions, call, outer), stack.module.training)
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    opened.handles += handles
    return opened


class _Untouched(Pass):
    """A forward of a stack that the prompts in use leave alone."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.touched = True


def _takes_positions(stack: Stack, shift: int | Tensor) -> bool:
    """Whether a stack is to be told where its text stands; a decoder beside an encoder counts its columns by itself."""
    where = stack.positions
    beside = stack.name == "decoder" and isinstance(shift, int) and shift == 0
    return where.argument or (where.table is not None and not beside)


def _refuse_left_padding(stack: Stack, mask: Tensor | None) -> None:
    """Refuse rows that begin with padding where it would change the answer with a prompt."""
    if mask is not None and not bool(mask[:, 0].all()):
        raise UnsupportedModeError(
            "a prompt needs rows that begin with text, in a model whose answer changes with padding before the text.",
            "Pad on the right, or run rows of one length together, without padding.",
            model=type(stack.module).__name__,
            attention_mask=f"{int((mask[:, 0] == 0).sum())} rows begin with padding",
        )


def _move_positions(
    stack: Stack, call: dict[str, Any], shift: int | Tensor, positions: Tensor, mask: Tensor | None, handles: list[Any]
) -> None:
    """Tell the stack where the text stands, in its own numbering: `shift` behind where it would stand alone."""
    where = stack.positions
    ids = positions + where.start + (shift.to(positions.device) if isinstance(shift, Tensor) else shift)
    if where.padding is not None and mask is not None:
        ids = ids.masked_fill(mask[:, -ids.shape[-1] :] == 0, where.padding)
    if where.argument:
        call["position_ids"] = ids
    elif where.table is not None and (mask is not None or isinstance(shift, Tensor) or shift):
        place_at_table(where.table, ids if where.table.by_row else _for_all_rows(stack, ids, mask), handles)


def _for_all_rows(stack: Stack, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The one numbering of all rows, [B or 1, T] -> [T], for a table that answers for the batch.

    Raises:
        UnsupportedModeError: rows differ in it.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[-1] :].bool().to(ids.device)
    one = torch.where(real, ids, 0).amax(0)
    if bool((real & (ids != one)).any()):
        raise UnsupportedModeError(
            "a prompt that enters attention needs rows whose texts start in one column behind prompts of one length, in a "
            "model that gives all rows of a batch the same positions.",
            "Pad on the right, and run rows with other prompts in batches of their own.",
            model=type(stack.module).__name__,
            rows=len(ids),
        )
    return one


def check_length(stack: Stack, call: dict[str, Any], length: int, cached: int = 0, outer: Outer | None = None) -> None:
    """Refuse a text that would stand beyond the last learned position; warn of one beyond what rotary ones are made for.

    Args:
        length: the virtual tokens.
        cached: how many of them a cache that is not empty holds.
        outer: what the call of the model brought.

    Raises:
        PromptTooLongError: prompt and text together exceed the table. Padding does not count.
    """
    positions = stack.positions
    limit = positions.limit if positions.limit is not None else positions.rotary
    if limit is None or length == 0 or (positions.limit is None and positions.warned):
        return
    longest = longest_text(call)
    if longest is None:
        _, columns = text_shape(call)
        past = past_of(call)
        past = past - cached if past else past
        if isinstance(past, Tensor) or past + columns + length <= limit:
            return
        mask = padding_mask(call, outer)
        longest = past + columns
        if mask is not None:
            longest = int(mask.long().sum(-1).max())
    if positions.limit is None:
        warn_beyond(positions, longest, length)
    else:
        _refuse_beyond(limit, longest, length)


def _refuse_beyond(limit: int, longest: int, length: int) -> None:
    if longest + length > limit:
        error = PromptTooLongError(
            "prompt and text together must fit into the model's positions.",
            "Truncate the text earlier, or use a shorter prompt.",
            prompt=length,
            text=longest,
            positions=limit,
        )
        error.text = longest
        raise error
