"""What prefix tuning and P-tuning v2 share: keys and values before those of the text, trained as they are or through an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.entry_points import groups_of, require_sites
from softhooks.encoder import PromptEncoder, TableEncoder
from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.method import Method

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure

RANDOM_STD = 0.02


class PrefixEncoder(PromptEncoder):
    """An MLP over learned rows, for each group its own: `Z -> Linear -> tanh -> Linear -> keys and values`.

    Args:
        tables: the keys and values that each group starts from, [P, numbers].
        width: H, of the learned rows.
        hidden_size: m, of the MLP.
        dropout: on the prefix.
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
        """Solve the last layer for the start that is asked for; exact where P is at most m.

        The reference code descends to it in 500 steps; least squares has the answer in closed form.
        """
        hidden = torch.tanh(self.down[group](self.rows[group])).double()
        up = self.up[group]
        target = table.double().to(hidden.device) - up.bias.double()  # type: ignore[operator]
        up.weight.copy_(torch.linalg.lstsq(hidden, target, driver="gelsd").solution.T)  # type: ignore[operator]

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group's keys and values, [P, numbers]."""
        prefix: Tensor = self.up[group](torch.tanh(self.down[group](self.rows[group])))
        return functional.dropout(prefix, self.dropout, self.training)


class LeafPrefix(TableEncoder):
    """Keys and values that are parameters themselves, with prefix dropout."""

    def __init__(self, tables: dict[str, Tensor], dropout: float) -> None:
        super().__init__(tables)
        self.dropout = dropout

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return one group's keys and values, [P, numbers]."""
        return functional.dropout(super().forward(group, variant), self.dropout, self.training)


@dataclass(frozen=True)
class DeepPrefix(Method):
    """A method whose prompt is keys and values.

    Args:
        projection: train an MLP that makes the prefix; only its result is saved.
        hidden_size: m, of the MLP.
        dropout: on the prefix.
        shift_positions: whether the text's positions start at P. None: yes in causal decoders, no elsewhere.
        windowed: whether sliding layers of a decoder see the prefix as tokens at the positions before the text, as a cache
            would; False shows the whole prefix to every token, as encoders do anyway.
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
        """Check the options against each other."""
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise OptionError(f"dropout must be at least 0 and below 1; it is {self.dropout}.")
        if self.hidden_size < 1:
            raise OptionError(f"hidden_size must be 1 or more; it is {self.hidden_size}.")

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Whether positions move and sliding layers see the prefix as tokens."""
        stack = structure.entry
        shift = stack.causal if self.shift_positions is None else self.shift_positions
        movable = stack.positions.can_shift
        if shift and not movable and not (stack.causal and stack.injection == "cache"):
            if self.shift_positions:
                raise UnsupportedMethodError(
                    "positions can be shifted only in a model that can be told where its text stands.",
                    "Leave shift_positions out.",
                    model=type(stack.module).__name__,
                )
            shift = False
        return {"shift_positions": shift, "windowed": self.windowed}

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the prefix for every group of the model, initialized."""
        require_sites(structure)
        tables = self.start(structure)
        if self.projection:
            return PrefixEncoder(tables, structure.entry.width, self.hidden_size, self.dropout)
        return LeafPrefix(tables, self.dropout)

    def start(self, structure: ModelStructure) -> dict[str, Tensor]:
        """The keys and values that each group starts from, [P, numbers of its sites]: from N(0, 0.02)."""
        return {
            group: torch.randn(self.num_virtual_tokens, sum(s.size for s in self.sites(stack, role))) * RANDOM_STD
            for group, (stack, role) in groups_of(structure).items()
        }
