"""Let a decoder attend to an encoder's slots: extend the cross-attention mask, and remove the slots from outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.stack import Stack
from softhooks.errors import PromptNotReachedError
from softhooks.inject.cache_notes import note_on
from softhooks.inject.slots.refused_calls import flat_mask
from softhooks.inject.slots.slot_tables import Slots
from softhooks.layout.slot_map import Widened, gather_columns


class CrossSlotPass(Pass):
    """A decoder's forward over encoder states that include slots.

    Args:
        slots: the prompts in the encoder.
        call: the arguments of the decoder's forward; the encoder's mask is extended in place.
    """

    def __init__(self, stack: Stack, encoder: Stack, slots: Slots, call: dict[str, Any]) -> None:
        super().__init__(stack)
        states = call.get("encoder_hidden_states")
        self._wide: Widened | None = None
        self.has_injected = True
        if not isinstance(states, Tensor):
            return
        batch, columns = states.shape[0], states.shape[1] - slots.columns
        given = call.get("encoder_attention_mask")
        wide = _wide_of(states, encoder)
        if wide is None or (given is not None and given.shape[-1] != columns):
            raise PromptNotReachedError(
                "the decoder received encoder states without the prompt's slots; encoder and decoder must run with the same "
                "prompts.",
                "Leave the encoder to the model, or call the encoder while the prompt is active.",
                states=f"{states.shape[1]} positions",
                mask="none" if given is None else f"{given.shape[-1]} tokens, plus {slots.columns} slots",
            )
        self._wide = wide
        if given is not None or slots.uneven:
            call["encoder_attention_mask"] = wide.spread_mask(flat_mask(given, batch, columns, states.device))

    def leave(self, output: Any) -> Any:
        """Remove the slots' columns from the cross-attentions."""
        wide = self._wide
        if wide is None or isinstance(output, tuple) or output.get("cross_attentions") is None:
            return output
        output["cross_attentions"] = tuple(
            gather_columns(weights, wide.text, 3) if isinstance(weights, Tensor) else weights
            for weights in output["cross_attentions"]
        )
        return output


def strip_encoder_state(output: Any, encoder: Stack) -> Any:
    """Remove the slots from the encoder's last hidden state in the output of an encoder-decoder."""

    def strip(state: Any) -> Any:
        wide = _wide_of(state, encoder) if isinstance(state, Tensor) else None
        return state if wide is None else wide.own_states(state)

    if isinstance(output, tuple):
        return tuple(strip(item) if note_on(item).slots is not None else item for item in output)
    if not isinstance(output, Tensor) and output.get("encoder_last_hidden_state") is not None:
        output["encoder_last_hidden_state"] = strip(output["encoder_last_hidden_state"])
    return output


def _wide_of(states: Tensor, encoder: Stack) -> Widened | None:
    """Return where text and slots are in an encoder's states; None if the states have no slots."""
    written = note_on(states).slots or encoder.state.encoded
    wide = None if written is None else written.widened(states.shape[0])
    return wide if wide is not None and wide.columns == states.shape[1] else None
