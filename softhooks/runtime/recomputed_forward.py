"""Check that a forward recomputed in the backward uses the same prompts as its first run.

A checkpoint around a whole model recomputes its forward in the backward: perhaps in another thread, outside the `with` block of
the first run, or after `activate`. It is unknown which forward is recomputed, so this is allowed only if all forwards since
`attach` have used the same prompts.
"""

from __future__ import annotations

import torch

from softhooks.errors import UnsupportedModeError


class RecomputeCheck:
    """The prompts of the forwards that a backward may recompute.

    Attributes:
        seen: the names of the first forward's prompts, as text.
        differs: whether later forwards have used different prompts.
    """

    def __init__(self) -> None:
        self.seen: str | None = None
        self.differs = False

    def note(self, selection: str, training: bool) -> None:
        """Note the prompts of a forward, or check them inside a backward.

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
                    "Checkpoint the layers with `gradient_checkpointing_enable()` instead of the whole model.",
                    before="several" if self.differs else self.seen or "unknown",
                    now=selection,
                )
        elif training or torch.is_grad_enabled():
            self.differs = self.differs or self.seen not in (None, selection)
            self.seen = selection if self.seen is None else self.seen
