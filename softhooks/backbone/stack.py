"""What a model is made of: its stacks, their attention, their positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from softhooks.backbone.attention_call import AttentionCall
from softhooks.backbone.stack_state import StackState

Role = Literal["self", "cross"]
StackName = Literal["text", "encoder", "decoder"]


@dataclass(eq=False)
class Site:
    """One attention module that a key-value prefix can enter.

    Attributes:
        module: the module that calls the attention function, or that hands its keys to the cache.
        index: its place among the sites of its stack and role; the layer's index where a cache is the way in.
        heads: Hk. key_dim, value_dim: D of the keys and of the values.
        turns: where one module serves several layers, as in ALBERT: their sites, in the order of its calls in a forward.
        call: how to call the module on states that stand at no position, once that was found out.
        is_windowed: whether its masks hide what is farther than the config's `sliding_window`, of which its calls do not tell.
    """

    stack: Stack
    role: Role
    index: int
    module: nn.Module
    heads: int
    key_dim: int
    value_dim: int
    turns: list[Site] = field(default_factory=list)
    call: AttentionCall | None = None
    is_windowed: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers one virtual token takes here."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(eq=False)
class PositionTable:
    """A module that answers with rows of a matrix of its own, one position after another.

    Attributes:
        weight: the name of the matrix.
        first: the row of a text's first token.
        by_row: whether its answers may differ from row to row of a batch.
    """

    module: nn.Module
    weight: str
    first: int
    by_row: bool = True


@dataclass(eq=False)
class Positions:
    """How a stack learns where its tokens stand.

    Attributes:
        argument: whether its forward takes `position_ids`, and heeds them.
        table: where it does not: its position table, if that can answer for it.
        start: the id that the first token of a row has in a bare forward (RoBERTa: padding_idx + 1; PaliGemma: 1).
        padding: the id of a padding column, where that is one of its own.
        limit: how many real positions there are, where exceeding them is an error rather than a loss of quality.
        trained: how many positions the config declares.
        rotary: how many its rotary embeddings are made for; beyond, quality is lost. None: it has none, or they adapt.
        warned: whether it was said that a prompt and its text stand beyond those.
        changes: from how many positions on the model rotates every position otherwise (dynamic RoPE, LongRoPE); None: never.
    """

    argument: bool
    table: PositionTable | None
    start: int
    padding: int | None
    limit: int | None
    trained: int | None
    rotary: int | None = None
    warned: bool = False
    changes: int | None = None

    @property
    def movable(self) -> bool:
        """Whether the stack can be told that its text stands behind a prefix."""
        return self.argument or self.table is not None


@dataclass(eq=False)
class Stack:
    """A text backbone: what takes ids and returns one state a token.

    Attributes:
        fills: the per-token arguments that a virtual slot has a value for, found out where slots are used.
        owner: the prompted model that the stack is part of.
        proven: the plain arguments of the call on which the ways in were compared; the same again change nothing.
        pooled: the module in it whose first column is handed to a pooler, where the pooler never sees the others.
        reads_ids: whether its states depend on ids beside their embeddings, once that was measured.
    """

    name: StackName
    path: str
    module: nn.Module
    embedding: nn.Module
    width: int
    causal: bool
    positions: Positions
    parameters: list[str]
    sites: list[Site] = field(default_factory=list)
    injection: Literal["attention", "written_out", "cache"] | None = None
    fills: dict[str, int] = field(default_factory=dict)
    proven: dict[str, Any] = field(default_factory=dict)
    pooled: nn.Module | None = None
    reads_ids: bool | None = None
    state: StackState = field(default_factory=StackState, init=False, repr=False)

    def sites_of(self, role: Role) -> list[Site]:
        """The sites of one role, in order of index."""
        return [site for site in self.sites if site.role == role]


@dataclass(eq=False)
class ModelStructure:
    """The stacks of a model. An encoder-decoder has two, everything else one.

    Attributes:
        choices: how many choices a row had in the probes, where the model takes rows of choices, [B, C, T]; else None.
    """

    stacks: list[Stack]
    vocabulary: int
    choices: int | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a decoder attends to an encoder here."""
        return len(self.stacks) == 2

    @property
    def entry(self) -> Stack:
        """The stack that the user's `input_ids` enter."""
        return self.stacks[0]
