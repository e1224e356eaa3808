"""A forward that a backward runs again, as a checkpoint around a whole model does: it must meet the prompts of its first run.

The backward may run in another thread, outside of the `with` block of the forward, or after `activate`, and nothing tells which
forward it repeats. So it is right where all forwards that may be meant have met the same prompts, and is refused elsewhere.
"""

from __future__ import annotations

import torch

from softhooks.errors import UnsupportedModeError


class RecomputeCheck:
    """What the forwards of a model that a backward may run again have met.

    Attributes:
        seen: the prompts, in words; of forwards that differ only those of the first.
        differs: whether forwards differ.
    """

    def __init__(self) -> None:
        self.seen: str | None = None
        self.differs = False

    def note(self, selection: str, training: bool) -> None:
        """Note what a forward meets, or check it where a backward runs it.

        Args:
            selection: the prompts that are on, in words.
            training: whether the model is in training mode; a reentrant checkpoint's first run has no gradients.

        Raises:
            UnsupportedModeError: the first run may have met other prompts.
        """
        if torch._C._current_graph_task_id() != -1:
            if self.differs or self.seen != selection:
                raise UnsupportedModeError(
                    "a forward that a backward runs again must meet the prompts that its first run met.",
                    "Checkpoint the layers with `gradient_checkpointing_enable()` in the place of the whole model.",
                    before="several" if self.differs else self.seen or "unknown",
                    now=selection,
                )
        elif training or torch.is_grad_enabled():
            self.differs = self.differs or self.seen not in (None, selection)
            self.seen = selection if self.seen is None else self.seen
