"""Insert slots into the sequence: add placeholder ids, replace their embeddings, and remove their states from the output.

Slots are used for encoders, for prompts that are not before the text, and for decoders whose prompt cannot be shared by all rows.
Outside the stack, tensors have the length of the text, without slots; only a decoder that attends to an encoder gets the states
of the encoder's slots too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.cache_notes import WrittenSlots, add_note, note_on
from softhooks.inject.caches import cache_of, caches_in, is_filled, is_recurrent
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.shift_positions import first_offset, positions_of, set_position_ids, widened_positions
from softhooks.inject.slots.argument_values import fill
from softhooks.inject.slots.refused_calls import (
    has_positions_in_types,
    mask_of_text,
    refuse_later_text,
    refuse_more_columns,
    refuse_static,
    refuse_unknown,
    replace_lengths,
)
from softhooks.inject.slots.slot_tables import Slots
from softhooks.inject.slots.strip import strip_attentions, strip_last, strip_output
from softhooks.inject.text_positions import OuterCall, given_positions, padding_mask
from softhooks.layout.slot_map import Places, Widened, gaps, widen


class SlotPass(Pass):
    """A forward with slots in the sequence.

    Args:
        call: the arguments of the forward, by name; the slots are added in place.
        placeholder: the id to insert at slots if `slots.ids` is None; the id of an ordinary token, not of padding.
        keep: whether the slots stay in the last hidden state, for a decoder that attends to it.

    Attributes:
        wide: where text and slots are in the sequence; None if the slots are in the cache.
    """

    def __init__(
        self,
        stack: Stack,
        slots: Slots,
        call: dict[str, Any],
        placeholder: int,
        keep: bool = False,
        outer: OuterCall | None = None,
    ) -> None:
        super().__init__(stack)
        self.slots = slots
        self.keep = keep
        self.outer = outer
        self.placeholder = placeholder
        self.wide: Widened | None = None
        self._cached: Widened | None = None
        self._asked = 0  # the call's `logits_to_keep`: how many of the last text columns to return; 0 for all
        self._embeds_given = call.get("input_ids") is None
        self._ids: Tensor | None = None  # set only if token types may be looked up in the same embedding
        text: Tensor = call["inputs_embeds"] if self._embeds_given else call["input_ids"]
        self.batch, self.columns = text.shape[:2]
        self.device = text.device
        replace_lengths(call, self.batch, self.columns)
        cache = cache_of(call)
        refuse_static(cache)
        if not is_filled(cache):
            self._insert(call)
        elif is_recurrent(cache):
            self._continue_state(cache)
        else:
            self._continue(call, cache, int(cache.get_seq_length()))

    # --- the first forward: insert the slots --------------------------------------------------------------------------

    def _insert(self, call: dict[str, Any]) -> None:
        refuse_unknown(call, self.stack, self.batch, self.columns)
        given = call.get("attention_mask")
        mask = mask_of_text(call, self.outer, (self.batch, self.columns), self.device, self.stack.causal)
        positions = given_positions(self.stack, call, self.outer)
        places = self.slots.places(mask, call.get("input_ids"))
        first = first_offset(self.stack, positions, mask)
        self._written = WrittenSlots(places, gaps(mask, places.offsets), self.columns, first)
        self.wide = self._widened(places, mask)
        self._mask = mask
        wide_mask = self.wide.spread_mask(mask)
        if call.get("input_ids") is not None:
            call["input_ids"] = self._insert_ids(self.wide, call["input_ids"])
        elif self.slots.ids is not None:
            raise UnsupportedModeError(
                f"the call has `inputs_embeds` instead of `input_ids`; {type(self.stack.module).__name__} also reads the ids, so "
                "slots need them.",
                "Call the model with `input_ids`.",
            )
        else:
            call["inputs_embeds"] = self._insert_rows(self.wide.spread(call["inputs_embeds"], 0))
            self.has_injected = True
        fill(call, self.wide, self.stack.slot_values)
        if call.get("token_type_ids") is not None:
            self._ids = call.get("input_ids")
        if given is not None or self.slots.uneven:
            call["attention_mask"] = wide_mask
        if not has_positions_in_types(call, mask):
            self._place(call, widened_positions(self.stack, positions, mask, self.wide, wide_mask))
        self._keep_states(call)

    def _keep_states(self, call: dict[str, Any]) -> None:
        """Increase the call's `logits_to_keep` (Gemma 4) by the number of slots between and after the tokens to keep."""
        asked = call.get("logits_to_keep")
        if isinstance(asked, int) and asked > 0:
            assert self.wide is not None
            self._asked = asked
            call["logits_to_keep"] = self.wide.columns - int(self.wide.text[:, -asked:].min())

    def _insert_ids(self, wide: Widened, ids: Tensor) -> Tensor:
        """Insert the slots' placeholder ids, [B, T] -> [B, N]."""
        spread = wide.spread(ids, self.placeholder)
        own = self.slots.stacked_ids(ids)
        return spread if own is None else spread.scatter(1, wide.slots, own.expand_as(wide.slots))

    def _place(self, call: dict[str, Any], ids: Tensor) -> None:
        """Pass position ids to the stack, unless its position table gives all rows the same positions."""
        where = self.stack.positions
        if where.takes_position_ids or (where.table is not None and where.table.by_row):
            self.table_positions = set_position_ids(self.stack, call, ids)
        elif call.get("position_ids") is not None:
            call["position_ids"] = ids  # they change nothing that `attach` measured, but need a value for each slot

    def looks_up_text(self, args: tuple[Any, ...]) -> bool:
        """Whether a call to the embedding looks up token ids; GPT-2 and CTRL also look up token types in it."""
        ids = self._ids
        if self._embeds_given:
            return False
        if ids is None or not args or not isinstance(args[0], Tensor) or args[0].numel() != ids.numel():
            return True
        return torch.equal(args[0].flatten(), ids.flatten())

    def embed(self, output: Tensor) -> Tensor:
        """Replace the embeddings of the placeholder ids with those of the prompt, [B, N, H]."""
        if self.wide is None or output.shape[1] != self.wide.columns:
            return output
        self.has_injected = True
        return self._insert_rows(output)

    def _insert_rows(self, output: Tensor) -> Tensor:
        assert self.wide is not None
        rows = self.slots.stacked(output).expand(output.shape[0], -1, -1)
        return output.scatter(1, self.wide.slots[..., None].expand_as(rows), rows)

    # --- later forwards of a generation: the slots are in the cache ---------------------------------------------------

    def _continue(self, call: dict[str, Any], cache: Any, past: int) -> None:
        written = note_on(cache).slots
        slots = 0 if written is None else written.places.offsets.shape[1]
        given, positions = call.get("attention_mask"), given_positions(self.stack, call, self.outer)
        total = past - slots + self.columns
        flat = padding_mask(call, self.outer)
        # The number of tokens by mask or positions must equal the number of cached tokens without slots plus the new tokens.
        seen = None if flat is None else flat.shape[-1]
        places = None if written is None else written.places_in(self.batch)
        if flat is None and positions is not None and positions.dim() == 2:
            first = 0 if written is None or places is None else written.first_in(self.batch)
            seen = int((positions - first).max()) + 1 - self.stack.positions.start
        if written is None or places is None or slots != self.slots.columns or (seen is not None and seen != total):
            raise UnsupportedModeError(
                "the cache does not contain this text with its slots; with slots, a cache can only be used in the generation "
                "that filled it (a `generate` call or decoding loop).",
                "Use `placement='front'` if `prompt.injection` is then 'shared', or generate from the whole text without an "
                "existing cache.",
                cache=f"{past} positions, {slots} of them slots",
                call=f"{self.batch} rows, {self.columns} new tokens; total length {'unknown' if seen is None else seen}, "
                f"expected {total}",
            )
        mask = mask_of_text(call, self.outer, (self.batch, total), self.device, self.stack.causal)
        refuse_later_text(gaps(mask, places.offsets), places.live, written.columns)
        wide = self._cached = self._widened(places, mask)
        wide_mask = wide.spread_mask(mask)
        if given is not None or self.slots.uneven:
            call["attention_mask"] = wide_mask
        counted = positions_of(self.stack, wide_mask)[:, -self.columns :]
        self._place(call, counted if positions is None else positions + places.live.sum(-1, keepdim=True))
        self.has_injected = True

    def _continue_state(self, cache: Any) -> None:
        """Check that the state of recurrent layers was computed with the slots."""
        written = note_on(cache).slots
        if written is None or written.places_in(self.batch) is None:
            raise UnsupportedModeError(
                f"{type(cache).__name__} was not computed with these slots; with slots, a cache can only be used in the "
                "generation that filled it (a `generate` call or decoding loop).",
                "Start again from the whole text, without the cache.",
                rows=self.batch,
            )
        self.has_injected = True

    def _widened(self, places: Places, mask: Tensor) -> Widened:
        """Place the slots in this batch. In a decoder, unused slots go to the left, because text is generated on the right."""
        spare_first = self.stack.causal and not self.keep
        return widen(gaps(mask, places.offsets), places.live, mask.shape[1], spare_first=spare_first)

    # --- the output ---------------------------------------------------------------------------------------------------

    def strip(self, states: Tensor) -> Tensor:
        """Remove the slots from states, [B, N, H] -> [B, T, H].

        In a decoder, a token before slots gets the state of the last of these slots, which predicts the next token.
        """
        wide = self.wide
        assert wide is not None
        return wide.predicting_states(states, self._mask) if self.stack.causal else wide.own_states(states)

    def leave(self, output: Any) -> Any:
        """Remove the slots from the stack's output, except from a last hidden state that a decoder attends to."""
        if self.wide is None:
            return output if self._cached is None else strip_attentions(output, self._cached)
        if self.stack.causal:
            for cache in caches_in(output):
                add_note(cache, slots=self._written)
        if self._asked and last_hidden_state(output).shape[1] < self.wide.columns:
            return strip_last(output, self.wide, self.strip, self._asked)
        refuse_more_columns(output, self.columns, self.wide.columns)
        stripped = strip_output(output, self.wide, self.strip, self.keep)
        if self.keep:
            self.stack.state.encoded = self._written
            for part in (stripped, last_hidden_state(stripped)):
                add_note(part, slots=self._written)
        return stripped

    def pooled(self, states: Any) -> Any:
        """Remove the slots from the input of a pooler inside the stack."""
        if self.wide is None or not isinstance(states, Tensor) or states.shape[1] != self.wide.columns:
            return states
        return self.wide.own_states(states)


class FallbackPass(SlotPass, CheckpointedPass):
    """A forward with slots in a stack whose rows normally share the prompt; recomputed layers run inside this pass again."""

    def detach_injected(self) -> None:
        """Do nothing: the prompt enters at the embedding, before all layers."""
