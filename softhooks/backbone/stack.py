"""The description of a model: its stacks, their attention modules and their positions."""

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
    """An attention module that keys and values can enter, for one layer of a stack.

    Attributes:
        index: the index among the sites of its stack and role; the layer's index if keys and values enter by a cache.
        module: the module that calls the attention function, or that passes its keys to the cache.
        heads: the number of key-value heads, Hk.
        key_dim, value_dim: the head dimensions of keys and values, D.
        shared_sites: the sites of a module that serves several layers (ALBERT), in the order of its calls in a forward.
        call: the arguments for calling the module on hidden states without positions; None until `projection_probe` finds them.
        is_windowed: whether its masks follow the config's `sliding_window`, although its calls do not pass the window.
    """

    stack: Stack
    role: Role
    index: int
    module: nn.Module
    heads: int
    key_dim: int
    value_dim: int
    shared_sites: list[Site] = field(default_factory=list)
    call: AttentionCall | None = None
    is_windowed: bool = False

    @property
    def size(self) -> int:
        """The number of values in the key and the value of one virtual token."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(eq=False)
class PositionTable:
    """A module that returns consecutive rows of its own matrix, one for each position.

    Attributes:
        weight: the name of the matrix.
        first: the row of a text's first token.
        by_row: whether rows of a batch can have different positions.
    """

    module: nn.Module
    weight: str
    first: int
    by_row: bool = True


@dataclass(eq=False)
class Positions:
    """The numbering of a stack's columns.

    Attributes:
        takes_position_ids: whether its forward takes `position_ids` and uses them.
        table: its position table, if it does not use `position_ids` and the table can be made to return other positions.
        start: the position id of a row's first token (RoBERTa: padding_idx + 1; PaliGemma: 1).
        padding: the position id of padding, if padding has its own.
        limit: the number of positions, if exceeding it is an error.
        trained: the number of positions that the config declares.
        rotary_limit: the number of positions that the rotary embeddings support; None if there are none or they have no limit.
        has_warned: whether the warning about exceeded positions was given.
        dynamic_rope_length: the length above which the frequencies of all rotary positions change, or None for never.
    """

    takes_position_ids: bool
    table: PositionTable | None
    start: int
    padding: int | None
    limit: int | None
    trained: int | None
    rotary_limit: int | None = None
    has_warned: bool = False
    dynamic_rope_length: int | None = None

    @property
    def can_shift(self) -> bool:
        """Whether the text can be given the positions after a prefix."""
        return self.takes_position_ids or self.table is not None


@dataclass(eq=False)
class Stack:
    """A text backbone: the module that takes token ids and returns one hidden state per token.

    Attributes:
        path: the module's path in the model; empty if it is the model itself.
        width: the width of its hidden states, H.
        causal: whether tokens see only earlier tokens.
        parameters: the names of the forward's arguments.
        sites: the attention modules that keys and values can enter.
        injection: how they enter: at the attention function, in inline attention, or by a cache; None if they cannot.
        slot_values: the per-token arguments with a known value for virtual slots; filled in when slots are used.
        compared_arguments: the non-tensor arguments of the call in which the shared prompt was compared with slots.
        pooled_module: the child whose first column goes to the pooler, if the pooler never sees the other columns.
        reads_ids: whether its states depend on token ids apart from their embeddings; None until measured.
        state: the forward that is running now.
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
    slot_values: dict[str, int] = field(default_factory=dict)
    compared_arguments: dict[str, Any] = field(default_factory=dict)
    pooled_module: nn.Module | None = None
    reads_ids: bool | None = None
    state: StackState = field(default_factory=StackState, init=False, repr=False)

    def sites_of(self, role: Role) -> list[Site]:
        """Return the sites of one role in the order of their indices."""
        return [site for site in self.sites if site.role == role]


@dataclass(eq=False)
class ModelStructure:
    """The stacks of a model: two in an encoder-decoder, otherwise one.

    Attributes:
        vocabulary: the number of rows of the input embedding.
        choices: the number of choices of a row in the probes, or None if the model does not take rows of choices, [B, C, T].
    """

    stacks: list[Stack]
    vocabulary: int
    choices: int | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a decoder attends to an encoder."""
        return len(self.stacks) == 2

    @property
    def entry(self) -> Stack:
        """The stack that the user's `input_ids` enter."""
        return self.stacks[0]
