"""The base class of prefix tuning and P-tuning v2: a key-value prefix, trained directly or through an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.attention_groups import groups_of, require_sites
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import UnsupportedMethodError, check_dropout, check_int
from softhooks.method import Method
from softhooks.prompt_encoder import PromptEncoder, TableEncoder

RANDOM_STD = 0.02


class MLPPrefixEncoder(PromptEncoder):
    """Computes each group with an MLP of its own over learned rows: `Z -> Linear -> tanh -> Linear -> keys and values`.

    Args:
        tables: the keys and values that each group starts from, [P, numbers].
        width: H, the width of the learned rows.
        hidden_size: m, the width of the MLP.
        dropout: dropout on the prefix.
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
        """Fit the last layer to the initial keys and values; exact if P is at most m.

        The reference code takes 500 steps of gradient descent; least squares has a closed form.
        """
        hidden = torch.tanh(self.down[group](self.rows[group])).double()
        up = self.up[group]
        target = table.double().to(hidden.device) - up.bias.double()  # type: ignore[operator]
        up.weight.copy_(torch.linalg.lstsq(hidden, target, driver="gelsd").solution.T)  # type: ignore[operator]

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group's keys and values, [P, numbers]."""
        prefix: Tensor = self.up[group](torch.tanh(self.down[group](self.rows[group])))
        return functional.dropout(prefix, self.dropout, self.training)


class PrefixEncoder(TableEncoder):
    """Keys and values that are parameters themselves, with dropout."""

    def __init__(self, tables: dict[str, Tensor], dropout: float) -> None:
        super().__init__(tables)
        self.dropout = dropout

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return one group's keys and values, [P, numbers]."""
        return functional.dropout(super().forward(group, variant), self.dropout, self.training)


@dataclass(frozen=True)
class KeyValuePrefix(Method):
    """A method whose prompt is keys and values.

    Args:
        projection: compute the prefix with an MLP, which is trained; only the prefix is saved.
        hidden_size: m, the width of the MLP.
        dropout: dropout on the prefix.
        shift_positions: start the text's positions at P. None shifts in causal decoders only.
        windowed: in layers with a sliding window, show the prefix only to tokens within the window, as a cache would. False
            shows the whole prefix to every token, as encoders always do.
    """

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
        check_int("hidden_size", self.hidden_size)

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return whether the text's positions are shifted, and whether sliding windows apply to the prefix."""
        stack = structure.entry
        shift = stack.causal if self.shift_positions is None else self.shift_positions
        movable = stack.positions.can_shift
        if shift and not movable and not (stack.causal and stack.injection == "cache"):
            if self.shift_positions:
                raise UnsupportedMethodError(
                    f"shift_positions is True, and {type(stack.module).__name__} takes no positions that could be shifted.",
                    "Leave shift_positions out.",
                    model=type(stack.module).__name__,
                )
            shift = False
        return {"shift_positions": shift, "windowed": self.windowed}

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the initialized prefix for every group of the model."""
        require_sites(structure)
        tables = self.initial_tables(structure)
        if self.projection:
            return MLPPrefixEncoder(tables, structure.entry.width, self.hidden_size, self.dropout)
        return PrefixEncoder(tables, self.dropout)

    def initial_tables(self, structure: ModelStructure) -> dict[str, Tensor]:
        """Sample the keys and values that each group starts from, [P, numbers of its layers], from N(0, 0.02)."""
        return {
            group: torch.randn(self.num_virtual_tokens, sum(s.size for s in self.sites(stack, role))) * RANDOM_STD
            for group, (stack, role) in groups_of(structure).items()
        }
