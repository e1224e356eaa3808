"""What a decoder must know about the slots of its encoder: they are there, and may be attended to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.anatomy import Stack
from softhooks.errors import PromptNotReachedError, explain
from softhooks.inject.accept import flat_mask
from softhooks.inject.passes import Pass
from softhooks.inject.slots import Slots
from softhooks.layout import Widened, gap_before, widen


class CrossSlotPass(Pass):
    """A decoder's forward over an encoder's widened states: its cross-attention mask grows by the slots.

    Args:
        stack: the decoder.
        slots: the prompts that stand in the encoder.
        call: the arguments of the decoder's forward; the encoder's mask is replaced in place.
    """

    def __init__(self, stack: Stack, slots: Slots, call: dict[str, Any]) -> None:
        super().__init__(stack)
        states = call.get("encoder_hidden_states")
        self._wide: Widened | None = None
        self.touched = True
        if not isinstance(states, Tensor):
            return
        batch, columns = states.shape[0], states.shape[1] - slots.columns
        given = call.get("encoder_attention_mask")
        if columns < 0 or (given is not None and given.shape[-1] != columns):
            raise PromptNotReachedError(
                explain(
                    "a decoder must be given the states of an encoder that ran with the prompt.",
                    "Let the model run its encoder itself, or call the encoder while the prompt is on.",
                    states=f"{states.shape[1]} columns",
                    mask="none" if given is None else f"{given.shape[-1]} columns and {slots.columns} slots",
                )
            )
        mask = flat_mask(given, batch, columns, states.device)
        self._wide = widen_encoder(slots, mask)
        if given is not None or slots.uneven:
            call["encoder_attention_mask"] = self._wide.spread_mask(mask)

    def leave(self, output: Any) -> Any:
        """Give cross-attentions the text's columns only."""
        wide = self._wide
        if wide is None or isinstance(output, tuple) or output.get("cross_attentions") is None:
            return output
        index = wide.text[:, None, None, :]
        output["cross_attentions"] = tuple(
            weights.gather(3, index.expand(-1, weights.shape[1], weights.shape[2], -1))
            if isinstance(weights, Tensor)
            else weights
            for weights in output["cross_attentions"]
        )
        return output


def widen_encoder(slots: Slots, mask: Tensor) -> Widened:
    """The map that the encoder's own pass used for this mask."""
    lengths = slots.lengths(mask.shape[0], mask.device)
    return widen(gap_before(mask, slots.placement), mask.shape[1], lengths, slots.columns)


def strip_encoder_state(output: Any, encoder: Stack, slots: Slots, mask: Any) -> Any:
    """Bring the encoder's last state in a task model's output back to the text's columns.

    Args:
        mask: the encoder's mask, for states that the caller brought along.
    """
    kept, wide = encoder.widened or (None, None)
    encoder.widened = None

    def strip(state: Any) -> Any:
        if not isinstance(state, Tensor):
            return state
        if wide is not None and state is kept:
            return wide.own_states(state)
        given = flat_mask(mask, state.shape[0], state.shape[1] - slots.columns, state.device)
        return widen_encoder(slots, given).own_states(state)

    if isinstance(output, tuple):
        return tuple(strip(item) if kept is not None and item is kept else item for item in output)
    if not isinstance(output, Tensor) and output.get("encoder_last_hidden_state") is not None:
        output["encoder_last_hidden_state"] = strip(output["encoder_last_hidden_state"])
    return output
