"""Check that a forward that is recomputed in the backward uses the same prompts as in its first run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softhooks.errors import UnsupportedModeError


@dataclass
class RecomputeCheck:
    """The prompts of earlier forwards, for a gradient checkpoint around the whole model.

    The recomputed forward may run in another thread, outside of the first run's `with` block or after `activate`. It is unknown
    which earlier forward is recomputed, so all must have used the same prompts.

    Attributes:
        seen: the names of the first forward's prompts, as text.
        differs: whether later forwards have used different prompts.
    """

    seen: str | None = None
    differs: bool = False

    def note(self, selection: str, training: bool) -> None:
        """Store the prompts of a forward, or check them inside a backward.

        Args:
            selection: the names of the active prompts, as text.
            training: whether the model is in training mode. The first run of a reentrant checkpoint has no gradients.

        Raises:
            UnsupportedModeError: the first run may have used different prompts.
        """
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            if self.differs or self.seen != selection:
                raise UnsupportedModeError(
                    "a backward recomputes a forward, but the prompts may have changed since its first run; "
                    "both runs must use the same prompts.",
                    "Checkpoint the layers (`gradient_checkpointing_enable()`) instead of the whole model.",
                    before="several" if self.differs else self.seen or "unknown",
                    now=selection,
                )
        elif training or torch.is_grad_enabled():
            self.differs = self.differs or self.seen not in (None, selection)
            self.seen = selection if self.seen is None else self.seen
