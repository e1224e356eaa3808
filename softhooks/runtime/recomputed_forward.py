"""Check that a forward that the backward runs again uses the same prompts as its first run.

A checkpoint around a whole model runs its forward again in the backward: perhaps in another thread, outside the `with` block of
the first run, or after `activate`. Nothing shows which forward is repeated, so this is allowed only if all forwards since the
attach have used the same prompts.
"""

from __future__ import annotations

import torch

from softhooks.errors import UnsupportedModeError


class RecomputeCheck:
    """The prompts of the forwards that a backward may run again.

    Attributes:
        seen: the names of the first forward's prompts, as text.
        differs: whether later forwards have used other prompts.
    """

    def __init__(self) -> None:
        self.seen: str | None = None
        self.differs = False

    def note(self, selection: str, training: bool) -> None:
        """Note the prompts of a forward; inside a backward, check them instead.

        Args:
            selection: the names of the prompts that are on, as text.
            training: whether the model is in training mode. The first run of a reentrant checkpoint has no gradients.

        Raises:
            UnsupportedModeError: the first run may have used other prompts.
        """
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            if self.differs or self.seen != selection:
                raise UnsupportedModeError(
                    "a backward runs a forward again, and its first run may have used other prompts; they must be the same.",
                    "Checkpoint the layers with `gradient_checkpointing_enable()` instead of the whole model.",
                    before="several" if self.differs else self.seen or "unknown",
                    now=selection,
                )
        elif training or torch.is_grad_enabled():
            self.differs = self.differs or self.seen not in (None, selection)
            self.seen = selection if self.seen is None else self.seen
