"""A prefix whose numbers are trained in units of their initial spread, so that one learning rate suits all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.prompt_encoder import PromptEncoder

SMALLEST = 0.1
"""The smallest unit, as a fraction of the mean unit; keys that differ little between tokens would otherwise hardly change."""


class ScaledPrefixEncoder(PromptEncoder):
    """Trains each number of a prefix in units of its standard deviation over the initial virtual tokens.

    Keys and values differ in size between layers and dimensions, and Adam's steps have the same size for all parameters.

    Args:
        tables: the initial keys and values for each group, [P, N] with P of at least 2.
        dropout: the dropout probability of the keys and values.
    """

    def __init__(self, tables: dict[str, Tensor], dropout: float) -> None:
        super().__init__()
        self.groups = tuple(tables)
        self.dropout = dropout
        self.rows = nn.ParameterDict()
        for group, table in tables.items():
            values = table.detach().float()
            units = _units(values)
            self.register_buffer(f"units_{group}", units)
            self.rows[group] = nn.Parameter(values / units)

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the keys and values of a group, [P, N]."""
        prefix: Tensor = self.rows[group] * getattr(self, f"units_{group}")
        return functional.dropout(prefix, self.dropout, self.training)


def _units(values: Tensor) -> Tensor:
    """Return the unit of each column, [N]; 1 if all rows are equal."""
    spread = values.std(dim=0)
    mean = float(spread.mean())
    return spread.clamp(min=mean * SMALLEST) if mean > 0 else torch.ones_like(spread)
