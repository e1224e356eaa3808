"""A front prompt that is computed once as a rule, and stands in the sequence for one call that could change its states."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.stack import Stack
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.slots.slot_pass import SlotPass
from softhooks.inject.slots.slot_tables import Slots
from softhooks.inject.text_positions import OuterCall


class FallbackPass(SlotPass, CheckpointedPass):
    """Slots in a stack whose attention layers expect a pass of their own, also when a checkpoint runs them again."""

    def __init__(
        self, stack: Stack, slots: Slots, call: dict[str, Any], placeholder: int, outer: OuterCall | None = None
    ) -> None:
        super().__init__(stack, slots, call, placeholder, outer=outer)
        if stack.module.training:
            self.follow_checkpointing()

    def detach_injected(self) -> None:
        """Nothing is put in behind the embedding."""
