"""The modules that compute a prompt, and hold what is trained."""

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
"""The group of an encoder whose prompt enters as embedding rows."""


class PromptEncoder(nn.Module):
    """What is trained: it makes a prompt, without a batch dimension.

    Subclasses list their `groups` and compute each in `forward`. A group is `embeddings`, or the part of the model that keys
    and values enter: `text`, or `encoder`, `decoder` and `cross`. What else a subclass may do has a default here: make one of
    several variants for each row, hide virtual tokens from some rows, keep its parameters within bounds.
    """

    groups: tuple[str, ...] = ()
    start_ids: Sequence[int | None] | None = None
    """The ids of the words that a new prompt's embedding rows are, None where a row is no word; None: no row is one."""

    is_constrained: ClassVar[bool] = False
    """Whether `constrain` must run after each optimizer step."""

    @property
    def unmoved(self) -> frozenset[str]:
        """The names of parameters whose gradient is zero whatever the model does, such as recurrent weights over one row."""
        return frozenset()

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group's prompt, [P, H] or [P, numbers of the group's sites]."""
        raise NotImplementedError(f"{type(self).__name__} must compute its groups {self.groups}.")

    def choose(self, given: dict[str, Tensor], batch: int) -> Sequence[int] | None:
        """Choose each row's variant by the extra arguments of the forward; None where there is only one."""
        return None

    def hidden(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Which virtual tokens each row does not see in this forward, [B or 1, P] bool; None: it sees all."""
        return None

    def constrain(self) -> None:
        """Bring the parameters back to where they may be, once after each step; runs without gradients."""

    def metrics(self) -> dict[str, float]:
        """What to show in a training log, by name: gates, shares of projected tokens. Asked for only when one is due."""
        return {}

    def folded(self) -> dict[str, Tensor]:
        """Run the reparameterization once and keep only its result, in fp32."""
        with self._at_rest():
            return {group: self(group).detach().float().clone() for group in self.groups}

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Compute as in evaluation, without gradients, in the parameters' own precision."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.train(training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or unpickled state; a copy is constrained as the original is."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)


class TableEncoder(PromptEncoder):
    """A prompt that is its own parameter: prompt tuning, a prefix without an MLP, and every folded prompt.

    Args:
        tables: [P, numbers] for each group.
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = tuple(tables)
        for group, table in tables.items():
            self.register_parameter(group, nn.Parameter(table.detach().float().clone()))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the parameter itself, [P, numbers]."""
        table: Tensor = getattr(self, group)
        return table


def require(given: dict[str, Tensor], name: str, why: str) -> Tensor:
    """An extra argument that a prompt cannot do without.

    Raises:
        UnsupportedModeError: the call did not bring it.
    """
    if name not in given:
        raise UnsupportedModeError(
            f"this prompt needs the argument `{name}` in each call of the model.",
            f"Add a column `{name}` to the batch, or pass it to the model.",
            because=why,
            given=", ".join(given) or "no extra argument",
        )
    return given[name]
