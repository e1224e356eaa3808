"""Prefix tuning: keys and values before those of the text, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks import initializers
from softhooks.errors import OptionError, UnsupportedMethodError, explain
from softhooks.method import Method, PromptEncoder, TableEncoder, choice, groups_of, require_sites

if TYPE_CHECKING:
    from softhooks.anatomy import Anatomy

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

    def forward(self, group: str) -> Tensor:
        """Compute one group's keys and values, [P, numbers]."""
        prefix: Tensor = self.up[group](torch.tanh(self.down[group](self.rows[group])))
        return functional.dropout(prefix, self.dropout, self.training)


class LeafPrefix(TableEncoder):
    """Keys and values that are parameters themselves, with prefix dropout."""

    def __init__(self, tables: dict[str, Tensor], dropout: float) -> None:
        super().__init__(tables)
        self.dropout = dropout

    def forward(self, group: str) -> Tensor:
        """Return one group's keys and values, [P, numbers]."""
        return functional.dropout(super().forward(group), self.dropout, self.training)


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning: P virtual keys and values in every layer, put in at attention.

    An encoder-decoder gets three independent prefixes: in the encoder's self-attention, the decoder's, and cross-attention.

    Start from a learning rate of 5e-3 with AdamW without the MLP, and of 5e-4 with it (the paper: 5e-5, P = 10, m = 512, many
    epochs). Keys and values of real words are by far the best start; zero is the safe one.

    Source: Li & Liang 2021, arXiv:2101.00190. Differs: no MLP by default, for a start from real words makes it stable; the MLP is
    fitted to its start by least squares instead of 500 steps; `windowed` is ours.

    Args:
        num_virtual_tokens: P.
        projection: train an MLP that makes the prefix; only its result is saved.
        hidden_size: m, of the MLP.
        dropout: on the prefix.
        init: `text` takes the keys and values of real words: of `init_text` or `init_ids`, repeated up to P, or of words sampled
            from the vocabulary where neither is given; `zero`; `random` draws from N(0, 0.02).
        init_text, init_ids: the text, cut to P tokens.
        tokenizer: the model's tokenizer or its name, for `init_text`.
        shift_positions: whether the text's positions start at P. None: yes in causal decoders, no elsewhere.
        windowed: whether sliding layers see the prefix as tokens at positions 0 to P-1, as a cache would; False shows the
            whole prefix to every token.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or belongs to another `init`.
        UnsupportedMethodError: the model's attention cannot be entered.
    """

    kind: ClassVar[str] = "prefix_tuning"
    enters: ClassVar[Literal["embeddings", "attention"]] = "attention"
    start_options: ClassVar[tuple[str, ...]] = ("init", "init_text", "init_ids")

    num_virtual_tokens: int
    projection: bool = field(default=False, kw_only=True)
    hidden_size: int = field(default=512, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    init: str = field(default="text", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_ids: Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    shift_positions: bool | None = field(default=None, kw_only=True)
    windowed: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        super().__post_init__()
        choice("init", self.init, ("text", "zero", "random"))
        if not 0.0 <= self.dropout < 1.0:
            raise OptionError(f"dropout must be at least 0 and below 1; it is {self.dropout}.")
        if self.hidden_size < 1:
            raise OptionError(f"hidden_size must be 1 or more; it is {self.hidden_size}.")
        if self.init != "text" and (self.init_text is not None or self.init_ids is not None):
            raise OptionError(f"init_text and init_ids belong to init='text'; init is {self.init!r}.")
        if self.init_text is not None and self.init_ids is not None:
            raise OptionError("init_text and init_ids say the same thing twice; give one of them.")
        if self.init_text is not None and self.tokenizer is None:
            raise OptionError(
                "init_text needs a tokenizer; none is given. Pass `tokenizer=`, or the ids as `init_ids=`."
            )

    def conventions(self, anatomy: Anatomy) -> dict[str, Any]:
        """Whether positions move and sliding layers see the prefix as tokens."""
        stack = anatomy.entry
        shift = stack.causal if self.shift_positions is None else self.shift_positions
        movable = stack.positions.argument
        if shift and not movable and not (stack.causal and stack.through == "cache"):
            if self.shift_positions:
                raise UnsupportedMethodError(
                    explain(
                        "positions can be shifted only in a model whose forward takes `position_ids`.",
                        "Leave shift_positions out.",
                        model=type(stack.module).__name__,
                    )
                )
            shift = False
        return {"shift_positions": shift, "windowed": self.windowed}

    def build(self, anatomy: Anatomy) -> PromptEncoder:
        """Make the prefix for every group of the model, initialised."""
        require_sites(anatomy)
        tables = self._start(anatomy)
        if self.projection:
            return PrefixEncoder(tables, anatomy.entry.width, self.hidden_size, self.dropout)
        return LeafPrefix(tables, self.dropout)

    def _start(self, anatomy: Anatomy) -> dict[str, Tensor]:
        count = self.num_virtual_tokens
        if self.init == "text":
            return initializers.key_values_of(anatomy, self._ids(anatomy))
        tables = {}
        for group, (stack, role) in groups_of(anatomy).items():
            numbers = sum(site.numbers for site in stack.sites_of(role))
            tables[group] = torch.zeros(count, numbers)
            if self.init == "random":
                tables[group].normal_(std=RANDOM_STD)
        return tables

    def _ids(self, anatomy: Anatomy) -> Tensor:
        count = self.num_virtual_tokens
        if self.init_ids is None and self.init_text is None:
            return initializers.vocabulary_ids(anatomy, count)
        ids = self.init_ids
        if ids is None:
            ids = initializers.tokenize(self.init_text or "", self.tokenizer, "init_text")
        if not len(ids):
            raise OptionError("init_ids must hold at least one id; it is empty.")
        repeated = torch.as_tensor(list(ids)).repeat(-(-count // len(ids)))[:count]
        initializers.embed_ids(anatomy, repeated)  # refuses ids outside the vocabulary
        return repeated
