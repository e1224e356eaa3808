"""Slots for one call of a prompt that is shared as a rule."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.stack import Stack
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.slots.slot_pass import SlotPass
from softhooks.inject.slots.slot_tables import Slots
from softhooks.inject.text_positions import OuterCall


class FallbackPass(SlotPass, CheckpointedPass):
    """A forward with slots in a stack whose checkpointed layers need their pass again in the backward."""

    def __init__(
        self, stack: Stack, slots: Slots, call: dict[str, Any], placeholder: int, outer: OuterCall | None = None
    ) -> None:
        super().__init__(stack, slots, call, placeholder, outer=outer)
        if stack.module.training:
            self.follow_checkpointing()

    def detach_injected(self) -> None:
        """Do nothing: the prompt enters at the embedding, before every layer."""
