"""`PromptEncoder`, the base class of the modules that compute a prompt."""

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
"""The name of the only group of a prompt whose virtual tokens are embeddings."""


class PromptEncoder(nn.Module):
    """A module that computes a prompt.

    A prompt consists of one or more tensors, called groups. Subclasses list the names of the groups in `groups`, and compute each
    group in `forward`. If the virtual tokens are embeddings, the only group is `embeddings`. If they are keys and values, the
    only group is `text`; on encoder-decoder models, the groups are `encoder` and `decoder` (self-attention) and `cross`
    (cross-attention). Subclasses can override the other methods to use several variants of the prompt in a batch (such as one
    for each task), to hide virtual tokens from some rows, or to constrain the parameters.
    """

    groups: tuple[str, ...] = ()
    start_ids: Sequence[int | None] | None = None
    """For each virtual token, the id of the word that initialized it, or None if no word did."""

    is_constrained: ClassVar[bool] = False
    """Whether `constrain` must run after each optimizer step."""

    @property
    def zero_gradient_parameters(self) -> frozenset[str]:
        """The names of parameters whose gradient is always zero, such as recurrent weights if there is only one virtual token."""
        return frozenset()

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group of the prompt: [P, H], or [P, number of key and value elements in the group's layers]."""
        raise NotImplementedError(f"{type(self).__name__} does not implement `forward` for its groups {self.groups}.")

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int] | None:
        """Return the variant that each row uses, or None if there is only one variant.

        Args:
            given: the method's batch columns in this forward pass.
            batch: the number of rows.
        """
        return None

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Return a mask that is True for virtual tokens that a row must not attend to, [B or 1, P], or None to hide none.

        Args:
            given: the method's batch columns in this forward pass.
            batch: the number of rows.
        """
        return None

    def constrain(self) -> None:
        """Bring the parameters back within their bounds. Called after each optimizer step, without gradients."""

    def metrics(self) -> dict[str, float]:
        """Return named values for the Trainer's log, such as the values of gates."""
        return {}

    def folded(self) -> dict[str, Tensor]:
        """Compute all groups in fp32, without gradients."""
        with self._inference():
            return {group: self(group).detach().float().clone() for group in self.groups}

    @property
    def device(self) -> torch.device:
        """The device of the parameters and buffers."""
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
        """Restore a copied or unpickled encoder, and constrain its parameters like those of the original."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)


class TableEncoder(PromptEncoder):
    """An encoder whose parameters are the prompt itself.

    Args:
        tables: the values of each group, [P, H] or [P, number of key and value elements].
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = tuple(tables)
        for group, table in tables.items():
            self.register_parameter(group, nn.Parameter(table.detach().float().clone()))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the parameter that holds a group."""
        table: Tensor = getattr(self, group)
        return table


def require_column(given: dict[str, Tensor], name: str, reason: str) -> Tensor:
    """Return a batch column that every forward pass needs.

    Raises:
        UnsupportedModeError: the call does not have the column.
    """
    if name not in given:
        raise UnsupportedModeError(
            f"the call has no `{name}`, which this prompt needs in every call to the model.",
            f"Add a column `{name}` to the batch, or pass it to the model.",
            because=reason,
            given=", ".join(given) or "no batch columns",
        )
    return given[name]
