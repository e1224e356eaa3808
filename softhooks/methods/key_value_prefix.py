"""The base class of prefix tuning and P-tuning v2: a key-value prefix, trained directly or through an MLP.

A model has one group of attention layers; an encoder-decoder has three: the encoder's self-attention, the decoder's, and the
cross-attention. The prefix has one matrix [P, N] for each group. Each row of the matrix consists of the keys and values of one
virtual token in all layers of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.attention_groups import groups_of, require_sites
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import MAX_WIDTH, UnsupportedMethodError, check_dropout, check_int
from softhooks.method import Method
from softhooks.prompt_encoder import PromptEncoder, TableEncoder

RANDOM_STD = 0.02


class MLPPrefixEncoder(PromptEncoder):
    """Computes the prefix of each group from vectors Z [P, H]: `Z -> Linear -> tanh -> Linear -> keys and values`.

    Each group has its own Z and its own MLP.

    Args:
        tables: the initial keys and values for each group, [P, N].
        width: H.
        hidden_size: m, the width of the MLP.
        dropout: the dropout probability of the keys and values.
    """

    def __init__(self, tables: dict[str, Tensor], width: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.groups = tuple(tables)
        self.dropout = dropout
        self.rows = nn.ParameterDict({g: nn.Parameter(torch.randn(t.shape[0], width)) for g, t in tables.items()})
        self.down = nn.ModuleDict({group: nn.Linear(width, hidden_size) for group in tables})
        self.up = nn.ModuleDict({group: nn.Linear(hidden_size, table.shape[1]) for group, table in tables.items()})
        for group, table in tables.items():
            self._fit(group, table)

    @torch.no_grad()
    def _fit(self, group: str, table: Tensor) -> None:
        """Fit the last layer to the initial keys and values by least squares; the fit is exact if P is at most m."""
        hidden = torch.tanh(self.down[group](self.rows[group])).double()
        up = self.up[group]
        target = table.double().to(hidden.device) - up.bias.double()  # type: ignore[operator]
        up.weight.copy_(torch.linalg.lstsq(hidden, target, driver="gelsd").solution.T)  # type: ignore[operator]

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the keys and values of a group, [P, N]."""
        prefix: Tensor = self.up[group](torch.tanh(self.down[group](self.rows[group])))
        return functional.dropout(prefix, self.dropout, self.training)


class PrefixEncoder(TableEncoder):
    """Keys and values that are trained directly, with dropout."""

    def __init__(self, tables: dict[str, Tensor], dropout: float) -> None:
        super().__init__(tables)
        self.dropout = dropout

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the keys and values of a group, [P, N]."""
        return functional.dropout(super().forward(group, variant), self.dropout, self.training)


@dataclass(frozen=True)
class KeyValuePrefix(Method):
    """A method whose prompt consists of keys and values. `PrefixTuning` documents the options."""

    enters: ClassVar[Literal["embeddings", "attention"]] = "attention"
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "shift_positions": (True, False),
        "windowed": (True, False),
    }

    num_virtual_tokens: int
    projection: bool = field(default=False, kw_only=True)
    hidden_size: int = field(default=512, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    shift_positions: bool | None = field(default=None, kw_only=True)
    windowed: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout("dropout", self.dropout)
        check_int("hidden_size", self.hidden_size, maximum=MAX_WIDTH)

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return whether the text's positions are shifted, and whether sliding windows apply to the prefix."""
        stack = structure.entry
        shift = stack.causal if self.shift_positions is None else self.shift_positions
        # With a cache, a causal model shifts the positions by itself.
        if shift and not stack.positions.can_shift and not (stack.causal and stack.injection == "cache"):
            if self.shift_positions:
                raise UnsupportedMethodError(
                    f"shift_positions is True, but the positions of {type(stack.module).__name__} cannot be shifted.",
                    "Leave shift_positions out.",
                    model=type(stack.module).__name__,
                )
            shift = False
        return {"shift_positions": shift, "windowed": self.windowed}

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with the initial keys and values."""
        require_sites(structure)
        tables = self.initial_tables(structure)
        if self.projection:
            return MLPPrefixEncoder(tables, structure.entry.width, self.hidden_size, self.dropout)
        return self.table_encoder(tables)

    def table_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a prefix without an MLP."""
        return PrefixEncoder(tables, self.dropout)

    def initial_tables(self, structure: ModelStructure) -> dict[str, Tensor]:
        """Sample the initial keys and values for each group, [P, N], with a standard deviation of 0.02."""
        return {
            group: torch.randn(self.num_virtual_tokens, sum(s.size for s in self.sites(stack, role))) * RANDOM_STD
            for group, (stack, role) in groups_of(structure).items()
        }
