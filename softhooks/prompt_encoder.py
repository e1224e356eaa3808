"""The interface of prompt encoders, the trainable modules that compute a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from softhooks.constraint import watch
from softhooks.errors import UnsupportedModeError

EMBEDDINGS = "embeddings"
"""The group name of an encoder that computes rows of embeddings."""


class PromptEncoder(nn.Module):
    """A module that computes a prompt, without a batch dimension.

    Subclasses set `groups` and compute each group in `forward`. A group is `embeddings`, or the part of the model that keys and
    values enter: `text`, or `encoder`, `decoder` and `cross`. All other methods have defaults; overriding them lets a prompt
    have one variant per row, hide virtual tokens from some rows, or keep its parameters within bounds.
    """

    groups: tuple[str, ...] = ()
    start_ids: Sequence[int | None] | None = None
    """The ids of the words that the rows of a new prompt are initialized from, with None for a row that is not a word."""

    is_constrained: ClassVar[bool] = False
    """Whether `constrain` must run after each optimizer step."""

    @property
    def zero_gradient_parameters(self) -> frozenset[str]:
        """Return the names of parameters whose gradient is always zero, such as recurrent weights over a single row."""
        return frozenset()

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group of the prompt: [P, H], or [P, number of key and value elements in the group's layers]."""
        raise NotImplementedError(f"{type(self).__name__} does not implement `forward` for its groups {self.groups}.")

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int] | None:
        """Choose the variant of each row.

        Args:
            given: the batch columns of the forward that the method takes.
            batch: the number of rows.

        Returns:
            a variant for each row, or None if there is only one variant.
        """
        return None

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Choose the virtual tokens that each row does not see in this forward.

        Args:
            given: the batch columns of the forward that the method takes.
            batch: the number of rows.

        Returns:
            True for hidden tokens, [B or 1, P], or None if every row sees all of them.
        """
        return None

    def constrain(self) -> None:
        """Bring the parameters back within their bounds; called after each optimizer step, without gradients."""

    def metrics(self) -> dict[str, float]:
        """Return values for the training log by name, such as gates; only called when the Trainer logs."""
        return {}

    def folded(self) -> dict[str, Tensor]:
        """Compute the groups once, in fp32, so that the reparameterization is no longer needed."""
        with self._inference():
            return {group: self(group).detach().float().clone() for group in self.groups}

    @property
    def device(self) -> torch.device:
        """The device of its parameters and buffers."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Run the `with` block in evaluation mode, without gradients and without autocast."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.train(training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled state, and constrain the copy like the original."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)


class TableEncoder(PromptEncoder):
    """An encoder whose parameters are the prompt itself: prompt tuning, a prefix without an MLP, and most folded prompts.

    Args:
        tables: the table of each group, [P, H] or [P, number of key and value elements].
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = tuple(tables)
        for group, table in tables.items():
            self.register_parameter(group, nn.Parameter(table.detach().float().clone()))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the parameter of a group."""
        table: Tensor = getattr(self, group)
        return table


def require_column(given: dict[str, Tensor], name: str, reason: str) -> Tensor:
    """Return a batch column that the prompt needs in each forward.

    Raises:
        UnsupportedModeError: the call does not have it.
    """
    if name not in given:
        raise UnsupportedModeError(
            f"the call has no `{name}`, which this prompt needs in every call of the model.",
            f"Add a column `{name}` to the batch, or pass it to the model.",
            because=reason,
            given=", ".join(given) or "no batch column of a prompt",
        )
    return given[name]
