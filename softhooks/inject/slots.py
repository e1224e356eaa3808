"""Virtual slots in the sequence: placeholders put into the ids, their embedding rows overwritten, their states stripped.

For encoders, for prompts that do not stand at the front, and for decoders whose front prompt cannot be shared. Outside the stack
every shape is what it was; only a decoder that attends to an encoder sees the encoder's slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.anatomy import Stack, first_state
from softhooks.errors import UnsupportedModeError, explain
from softhooks.inject.accept import flat_mask, refuse_moved_positions, refuse_static, refuse_unknown
from softhooks.inject.passes import Pass
from softhooks.inject.provenance import caches_in
from softhooks.inject.strip import strip_attentions, strip_output
from softhooks.layout import Placement, Widened, gap_before, text_positions, widen


@dataclass
class Slots:
    """The prompts of a batch, as slots.

    Attributes:
        rows: [P, H] for each prompt in use.
        choice: for each row of the batch, which prompt (None: no prompt); None: the first, for every row.
        placement: where they stand.
    """

    rows: Sequence[Tensor]
    choice: Sequence[int | None] | None
    placement: Placement

    @property
    def columns(self) -> int:
        """S, the slots of the longest prompt."""
        return max(rows.shape[0] for rows in self.rows)

    def lengths(self, batch: int, device: torch.device) -> Tensor:
        """How many slots each row uses, [B]."""
        if self.choice is None:
            return torch.full((batch,), self.rows[0].shape[0], device=device)
        lengths = [0 if row is None else self.rows[row].shape[0] for row in self.choice]
        return torch.tensor(lengths, device=device)

    @property
    def uneven(self) -> bool:
        """Whether some row leaves slots unused."""
        return self.choice is not None and any(
            row is None or self.rows[row].shape[0] < self.columns for row in self.choice
        )

    def stacked(self, like: Tensor) -> Tensor:
        """The embedding rows of all slots, [1 or B, S, H], in the precision of the text's."""
        if self.choice is None:
            return self.rows[0].to(like)[None]
        padded = [functional.pad(rows, (0, 0, 0, self.columns - rows.shape[0])) for rows in self.rows]
        table = torch.stack([*padded, torch.zeros_like(padded[0])]).to(like)
        index = [len(self.rows) if row is None else row for row in self.choice]
        return table[torch.tensor(index, device=like.device)]


@dataclass
class _Written:
    """What a cache holds beside text: kept with the cache that slots were written into.

    Attributes:
        slots: S. gap: the text column that they stand before, [B].
        columns: the text columns of the forward that wrote them.
    """

    slots: int
    gap: Tensor
    columns: int


_WRITTEN = "_softhooks_slots"
"""The attribute of a cache that holds what was written into it; a copy of the cache has it too."""


class SlotPass(Pass):
    """One forward with slots in the sequence.

    Args:
        stack: the stack.
        slots: the prompts.
        call: the arguments of the forward, by name; widened in place.
        placeholder: an ordinary id that is not padding.
        keep: whether the returned last state keeps the slots, for a decoder that attends to it.
    """

    def __init__(self, stack: Stack, slots: Slots, call: dict[str, Any], placeholder: int, keep: bool = False) -> None:
        super().__init__(stack)
        self.slots = slots
        self.keep = keep
        self.placeholder = placeholder
        self._wide: Widened | None = None
        self._cached: Widened | None = None
        text = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if not isinstance(text, Tensor):
            raise UnsupportedModeError("slots need `input_ids` or `inputs_embeds` in the call of the model's backbone.")
        self.batch, self.columns = text.shape[:2]
        self.device = text.device
        refuse_unknown(call, self.batch, self.columns)
        cache = call.get("past_key_values")
        refuse_static(cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            self._continue(call, cache, past)
        else:
            self._begin(call)

    # --- the first forward: the slots go in ---------------------------------------------------------------------------

    def _begin(self, call: dict[str, Any]) -> None:
        given = call.get("attention_mask")
        mask = flat_mask(given, self.batch, self.columns, self.device)
        refuse_moved_positions(call.get("position_ids"), mask)
        self._gap = gap_before(mask, self.slots.placement)
        self._wide = self._widened(self._gap, self.columns)
        self._mask = mask
        wide_mask = self._wide.spread_mask(mask)
        if call.get("input_ids") is not None:
            call["input_ids"] = self._wide.spread(call["input_ids"], self.placeholder)
        else:
            call["inputs_embeds"] = self._overwrite(self._wide.spread(call["inputs_embeds"], 0))
            self.touched = True
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = self._wide.spread(call["token_type_ids"], 0)
        if given is not None or self.slots.uneven:
            call["attention_mask"] = wide_mask
        self._place(call, wide_mask, self._wide.columns)

    def _place(self, call: dict[str, Any], wide_mask: Tensor, last: int) -> None:
        """Tell the stack where the last columns of the widened mask stand."""
        positions = self.stack.positions
        ids = positions_of(self.stack, wide_mask)[:, -last:]
        if positions.argument:
            call["position_ids"] = ids
        elif positions.table is not None and not self.stack.causal:
            place_at_table(positions.table, ids, self.handles)

    def embed(self, output: Tensor) -> Tensor:
        """Overwrite the slots' rows of the embedding's output, [B, N, H]."""
        if self._wide is None or output.shape[1] != self._wide.columns:
            return output
        self.touched = True
        return self._overwrite(output)

    def _overwrite(self, output: Tensor) -> Tensor:
        assert self._wide is not None
        rows = self.slots.stacked(output).expand(output.shape[0], -1, -1)
        return output.scatter(1, self._wide.slots[..., None].expand_as(rows), rows)

    # --- later forwards of a generation: the slots are in the cache ---------------------------------------------------

    def _continue(self, call: dict[str, Any], cache: Any, past: int) -> None:
        written: _Written | None = getattr(cache, _WRITTEN, None)
        slots = 0 if written is None else written.slots
        given = call.get("attention_mask")
        total = past - slots + self.columns
        seen = None if given is None else given.shape[-1]
        if given is None and call.get("position_ids") is not None:
            seen = int(call["position_ids"].max()) + 1
        if written is None or written.slots != self.slots.columns or (seen is not None and seen != total):
            raise UnsupportedModeError(
                explain(
                    "slots in the sequence need a cache that their own generation has filled, token by token.",
                    "Use `placement='front'` on a model that can share its prompt (`prompt.injection`), or generate without "
                    "an assistant and without a cache from before.",
                    cache=f"{past} columns, {slots} of them slots",
                    call=f"{self.columns} new tokens of {'unknown' if seen is None else seen} in all, {total} expected",
                )
            )
        mask = flat_mask(given, self.batch, total, self.device)
        gap = written.gap
        if self.slots.placement != "end":
            gap = self._gap_of(mask, written)  # beams may have been reordered; the mask knows
        elif bool((gap != gap[0]).any()):
            raise UnsupportedModeError("slots at the end need left padding in generation.")
        wide = self._cached = self._widened(gap[:1].expand(self.batch) if gap.shape[0] != self.batch else gap, total)
        wide_mask = wide.spread_mask(mask)
        if given is not None or self.slots.uneven:
            call["attention_mask"] = wide_mask
        self._place(call, wide_mask, self.columns)
        self.touched = True

    def _gap_of(self, mask: Tensor, written: _Written) -> Tensor:
        """Where the slots stand in the cache; a row whose text begins later has padding between, and sliding windows see it."""
        gap = gap_before(mask, self.slots.placement)
        if bool((gap > written.columns).any()):
            raise UnsupportedModeError(
                explain(
                    "slots need a row's first token in the first chunk of a prefill.",
                    "Use a larger `prefill_chunk_size`, or a prompt that enters as keys and values (`prompt.injection`).",
                    chunk=f"{written.columns} columns",
                    row=f"{int(gap.argmax())}, whose text begins later",
                )
            )
        return gap

    def _widened(self, gap: Tensor, columns: int) -> Widened:
        """The map of this batch. In a decoder spare slots go to the left, for text will be generated at the right."""
        lengths = self.slots.lengths(self.batch, self.device)
        spare_first = self.stack.causal and not self.keep
        return widen(gap, columns, lengths, self.slots.columns, spare_first=spare_first)

    # --- the way out --------------------------------------------------------------------------------------------------

    def strip(self, states: Tensor) -> Tensor:
        """Bring states back to the text's columns, [B, N, H] -> [B, T, H]."""
        assert self._wide is not None
        if self.stack.causal:
            return self._wide.predicting_states(states, self._mask)
        return self._wide.own_states(states)

    def leave(self, output: Any) -> Any:
        """Strip states, hidden states and attentions; for a decoder that attends to this stack, keep the last state."""
        if self._wide is None:
            return output if self._cached is None else strip_attentions(output, self._cached)
        if self.stack.causal:
            for cache in caches_in(output):
                setattr(cache, _WRITTEN, _Written(self.slots.columns, self._gap, self.columns))
        if self.keep:
            self.stack.widened = (first_state(output), self._wide)
        return strip_output(output, self._wide, self.strip, self.keep)

    def pooled(self, states: Any) -> Any:
        """What a pooler inside the stack may see."""
        if self._wide is None or not isinstance(states, Tensor) or states.shape[1] != self._wide.columns:
            return states
        return self._wide.own_states(states)


def positions_of(stack: Stack, mask: Tensor) -> Tensor:
    """The ids of each column in the stack's own numbering. [B, N] -> [B, N]."""
    positions = stack.positions
    ids = text_positions(mask) + positions.start
    return ids.masked_fill(mask == 0, positions.padding) if positions.start else ids


class _Answer:
    """A learned position table that takes no ids, made to answer for given ones until it is removed."""

    def __init__(self, table: nn.Embedding, ids: Tensor) -> None:
        self.table = table
        self.ids = ids + int(getattr(table, "offset", 0))
        self.before = table.__dict__.get("forward")
        table.__dict__["forward"] = self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return functional.embedding(self.ids, self.table.weight)

    def remove(self) -> None:
        del self.table.__dict__["forward"]
        if self.before is not None:
            self.table.__dict__["forward"] = self.before


def place_at_table(table: nn.Embedding, ids: Tensor, handles: list[Any]) -> None:
    """Make a learned position table that takes no ids answer for these, until the handles are removed.

    In its forward's place, for that fails on padded rows with more columns than positions.
    """
    handles.append(_Answer(table, ids))
