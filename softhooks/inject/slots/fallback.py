"""A front prompt that is computed once as a rule, and stands in the sequence for one call that could change its states."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.checkpointing import CheckpointedPass
from softhooks.inject.slots.rows import Slots
from softhooks.inject.slots.slots import SlotPass
from softhooks.inject.text_position import Outer


class FallbackPass(SlotPass, CheckpointedPass):
    """Slots in a stack whose attention layers expect a pass of their own, also when a checkpoint runs them again."""

    def __init__(
        self, stack: Stack, slots: Slots, call: dict[str, Any], placeholder: int, outer: Outer | None = None
    ) -> None:
        super().__init__(stack, slots, call, placeholder, outer=outer)
        if stack.module.training:
            self.follow_checkpointing()

    def detach_injected(self) -> None:
        """Nothing is put in behind the embedding."""


def refusal(reached: list[str], error: UnsupportedModeError) -> UnsupportedModeError:
    """Say why a call that slots cannot serve was not served in the way that `prompt.injection` names."""
    return UnsupportedModeError(
        f"this call brings {', '.join(reached)}, which could change the states of virtual tokens; so the prompt is not computed "
        f"once, but stands in the sequence here.\n{error}"
    )


def require_sharing(name: str, reached: list[str]) -> None:
    """Refuse a call for a prompt that may only be computed once.

    Raises:
        UnsupportedModeError: always.
    """
    raise UnsupportedModeError(
        "a prompt that is computed once must not depend on what a call brings beside its text.",
        "Leave the argument out, or attach the prompt without `injection='shared'`: it then stands in the sequence for such "
        "calls.",
        prompt=name,
        call=", ".join(reached),
    )
