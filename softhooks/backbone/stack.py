"""Describe a model: its text backbones (stacks), each with its attention modules (sites) and positions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from softhooks.backbone.example import Example
from softhooks.backbone.stack_state import StackState

Role = Literal["self", "cross"]
StackName = Literal["text", "encoder", "decoder"]


@dataclass(eq=False)
class AttentionCall:
    """The arguments with which a module computes the keys and values of an attention layer, without positions or a mask.

    Attributes:
        module: the attention module, or the module around it that computes the inputs of keys and values (MobileBERT).
        number: which of the module's calls to the attention function is the site's; 0 if it makes only one.
        width: the width of the hidden states, H.
        query_heads: the number of query heads, Hq.
        args, kwargs: the arguments, with None in place of the hidden states.
        places: where the hidden states are passed: indices in `args` and names in `kwargs`. Usually this is one place.
        by_row: whether the other arguments are repeated for each sequence; most modules broadcast them (not Qwen4-exp's indexer).
        axis: the dimension of the tokens in the hidden states, 1 in [B, T, H], and 2 in [B, H, T] (SqueezeBERT).
        failure: why the module cannot be called with these arguments; empty if it can.
    """

    module: nn.Module
    number: int
    width: int
    query_heads: int
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[int | str]
    axis: int = 1
    by_row: bool = False
    failure: str = ""

    def arguments(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with hidden states [N, H] inserted as N sequences of one token."""
        args = [_on_device_of(value, rows) for value in self.args]
        kwargs = {name: _on_device_of(value, rows) for name, value in self.kwargs.items()}
        if self.by_row:
            args = [_expanded(value, len(rows)) for value in args]
            kwargs = {name: _expanded(value, len(rows)) for name, value in kwargs.items()}
        for place in self.places:
            if isinstance(place, int):
                args[place] = rows.unsqueeze(self.axis)
            else:
                kwargs[place] = rows.unsqueeze(self.axis)
        return args, kwargs


def _expanded(value: Any, count: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1:
        return value.expand(count, *[-1] * (value.dim() - 1))
    return tuple(_expanded(part, count) for part in value) if isinstance(value, tuple) else value


def _on_device_of(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(rows) if value.is_floating_point() else value.to(rows.device)
    if isinstance(value, tuple):
        return tuple(_on_device_of(part, rows) for part in value)
    return copy.copy(value) if isinstance(value, dict) else value  # the layer may write to a dictionary


@dataclass(eq=False)
class Site:
    """An attention module that keys and values can enter, in one layer of a stack.

    Attributes:
        role: "self" for self-attention, "cross" for cross-attention.
        index: the index among the stack's sites with this role; the layer's index if keys and values enter through a cache.
        module: the module that calls the attention function, or that passes keys and values to the cache.
        heads: the number of key-value heads, Hk.
        key_dim, value_dim: the head dimensions of keys and values, D.
        shared_sites: one site per layer if several layers share the module (ALBERT), in the order of the calls.
        call: the arguments for computing keys and values of single hidden states; None until `projection_probe` finds them.
        scaling: the factor of the scores, if keys and values enter through a cache and a gated branch can enter the attention;
            otherwise None (`decoder_attention`).
        is_windowed: whether the config's `sliding_window` limits its masks, even if its attention calls do not pass the window.
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
    scaling: float | None = None
    is_windowed: bool = False

    @property
    def size(self) -> int:
        """The total number of elements in the key and the value of one virtual token."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(eq=False)
class PositionTable:
    """A module that returns consecutive rows of its position embedding matrix.

    Attributes:
        weight: the name of the matrix.
        first: the row for the first token of a text.
        by_row: whether the rows of a batch can have different positions.
    """

    module: nn.Module
    weight: str
    first: int
    by_row: bool = True


@dataclass(eq=False)
class Positions:
    """The positions that a stack gives to its tokens.

    Attributes:
        takes_position_ids: whether the stack's forward accepts and uses `position_ids`.
        for_each_row: whether `position_ids` must have as many rows as the batch (XLM).
        table: the stack's position table, if its forward uses no `position_ids` and the table can be made to return other rows.
        start: the position id of the first token (RoBERTa: padding_idx + 1; PaliGemma: 1).
        padding: the position id of padding, if padding has its own.
        limit: the number of positions, if exceeding it is an error.
        trained: the config's `max_position_embeddings`.
        rotary_limit: the number of positions that the rotary embeddings support; None if unlimited or not rotary.
        has_warned: whether the user was warned that a text exceeds `rotary_limit`.
        dynamic_rope_length: the length above which all rotary frequencies change (dynamic RoPE), or None.
    """

    takes_position_ids: bool
    table: PositionTable | None
    start: int
    padding: int | None
    limit: int | None
    trained: int | None
    rotary_limit: int | None = None
    has_warned: bool = False
    for_each_row: bool = False
    dynamic_rope_length: int | None = None

    @property
    def can_shift(self) -> bool:
        """Whether the text can be moved to the positions after a prefix."""
        return self.takes_position_ids or self.table is not None


@dataclass(eq=False)
class Stack:
    """A text backbone: the module that receives token ids and returns one hidden state per token.

    Attributes:
        path: the module's path in the model; empty if it is the model itself.
        embedding: its input embedding.
        width: the width of its hidden states, H.
        causal: whether tokens see only earlier tokens.
        parameters: the argument names of its forward.
        sites: the attention modules that keys and values can enter.
        injection: how keys and values enter: through the attention function, inline attention or a cache; None if they cannot.
        slot_values: the value of each per-token argument at virtual tokens, by argument name; set when slots are used.
        compared_arguments: the non-tensor arguments of the forward in which `injection="shared"` was compared with `"slots"`.
        pooled_module: the child whose state for the first token is the pooler's only input; None if there is no such pooler.
        reads_ids: whether its states depend on token ids and not only on embeddings; None until measured.
        features: the argument with an image, a sound, or their hidden states, if the model takes these instead of token ids. The
            embedding then has no rows.
        probe_call: the arguments of its forward on one row, by name, in a model that takes an image or a sound; otherwise empty.
        state: its running forward.
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
    features: str | None = None
    probe_call: dict[str, Any] = field(default_factory=dict, repr=False)
    state: StackState = field(default_factory=StackState, init=False, repr=False)

    @property
    def takes_branches(self) -> bool:
        """Whether a gated branch can enter the attention functions of all sites."""
        if self.injection == "cache":
            return all(site.scaling is not None for site in self.sites)
        return self.injection is not None

    def sites_of(self, role: Role) -> list[Site]:
        """Return the sites with this role (self- or cross-attention), in the order of their indices."""
        return [site for site in self.sites if site.role == role]


@dataclass(eq=False)
class ModelStructure:
    """The stacks of a model: two in an encoder-decoder, otherwise one.

    Attributes:
        vocabulary: the number of rows of the input embedding; 0 if the model does not take token ids.
        example: makes the arguments of probe forwards.
        changes_modules: whether forwards store state in the model's modules, so that threads must take turns.
    """

    stacks: list[Stack]
    vocabulary: int
    example: Example = field(default_factory=Example)
    changes_modules: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return len(self.stacks) == 2

    @property
    def embeds_tokens(self) -> bool:
        """Whether the model takes token ids."""
        return self.entry.features is None

    @property
    def entry(self) -> Stack:
        """The stack that receives the `input_ids` of the model's forward."""
        return self.stacks[0]
