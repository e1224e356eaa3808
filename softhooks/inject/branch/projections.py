"""Give rows to an attention module and take the keys and values that it makes of them, whatever it is made of.

The module runs its own forward on rows that stand nowhere: each alone in a sequence of one token, unrotated, without mask and
cache. What its attention function is handed are their keys and values. So separate, fused, biased and low-rank projections, norms
of keys, and adapters on any of them need no code here. Whether it works is found out by running it (`feedprobe`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.branch.linear_scaling import Scaled, scale


@dataclass(eq=False)
class Feed:
    """How to call a site's attention module for rows that stand nowhere.

    Attributes:
        width: H, of the rows.
        query_heads: Hq.
        args, kwargs: the arguments of the call; the rows stand where None is at `place`.
        place: which argument the rows are, by number or by name.
        failure: why the site cannot be given rows; empty if it can.
    """

    width: int
    query_heads: int
    args: list[Any]
    kwargs: dict[str, Any]
    place: int | str
    failure: str = ""

    def call(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for rows, [N, H]."""
        args = [_beside(value, rows) for value in self.args]
        kwargs = {name: _beside(value, rows) for name, value in self.kwargs.items()}
        if isinstance(self.place, int):
            args[self.place] = rows[:, None]
        else:
            kwargs[self.place] = rows[:, None]
        return args, kwargs


class _FeedPass(Pass):
    """Note what one attention function is handed, and answer nothing."""

    def __init__(self, stack: Stack, scaled: Scaled) -> None:
        super().__init__(stack)
        self.entered = True  # no call of the stack belongs to it
        self.scaled = scaled
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the key and the value, [N, Hk, 1, D]."""
        query, self.key, self.value = args[1:4]
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], self.value.shape[3]), None

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Scale what the module's linear layers return, as the prompt does for the text."""
        return scale(self.scaled, name, output)


def keys_and_values(site: Site, rows: Tensor, scaled: Scaled | None = None) -> tuple[Tensor, Tensor]:
    """Run rows through a site's own projections.

    Args:
        scaled: how the prompt scales linear layers.

    Shape:
        rows [N, H] -> keys [N, Hk, Dk], values [N, Hk, Dv]
    """
    feed, module, stack = site.feed, site.module, site.stack
    assert feed is not None
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    rows = rows if weight is None or weight.is_meta else rows.to(weight)
    args, kwargs = feed.call(rows)
    live = _FeedPass(stack, scaled or {})
    outer, stack.live = stack.live, live
    try:
        module.forward(*args, **kwargs)  # not the call: hooks that collect attentions count them
    finally:
        stack.live = outer
    assert live.key is not None
    assert live.value is not None
    return live.key.squeeze(2), live.value.squeeze(2)


def feed_of(site: Site) -> Feed:
    """How to give rows to a site.

    Raises:
        UnsupportedMethodError: naming the layer that cannot be given rows, and why.
    """
    assert site.feed is not None, "find_feeds comes first"
    if site.feed.failure:
        raise UnsupportedMethodError(
            "a gated branch needs layers whose keys and values are made of their input alone.",
            "Use another method, such as PrefixTuning; `num_layers` leaves layers out from below.",
            layer=f"{type(site.module).__name__}, number {site.index} of {site.stack.path or 'the model'}",
            because=site.feed.failure,
        )
    return site.feed


def _beside(value: Any, rows: Tensor) -> Any:
    """Bring an argument to where the rows are; what a layer may write to is copied."""
    if isinstance(value, Tensor):
        return value.to(rows) if value.is_floating_point() else value.to(rows.device)
    if isinstance(value, tuple):
        return tuple(_beside(part, rows) for part in value)
    return copy.copy(value) if isinstance(value, dict) else value
