"""P-tuning v2: a key-value prefix that is trained together with a classification or tagging head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from softhooks.backbone.stack import Role, Site, Stack
from softhooks.errors import OptionError
from softhooks.methods.key_value_prefix import KeyValuePrefix


@dataclass(frozen=True)
class PTuningV2(KeyValuePrefix):
    """P-tuning v2: P trained keys and values in every layer, or in chosen layers, with a trained head.

    The head may classify sequences or tokens, or extract spans; `attach` makes a copy of the head, which is trained with the
    prompt. Token labels and span positions refer to the text without the prompt.

    Start with AdamW, a learning rate of 3e-2 (the paper uses 5e-3 to 6e-2) and 8 to 128 virtual tokens; hard tagging tasks need
    the most.

    Source: Liu et al. 2021, arXiv:2110.07602. Differences: dropout uses one mask for all rows of a batch, because the prefix is
    computed once; an encoder's positions are shifted only with `shift_positions=True`, whereas the authors always shift BERT's;
    the MLP is fitted to the initial prefix by least squares.

    Args:
        num_virtual_tokens: P.
        layers: the layers that get a prefix, counted from 0 in each encoder or decoder, or from the top with negative numbers;
            `range(-12, 0)` selects the top twelve. None selects every layer.
        projection: compute the prefix with a trained MLP; only the prefix is saved.
        hidden_size: the width of the MLP.
        dropout: the dropout probability of the prefix.
        shift_positions: start the text's position ids at P; by default, only in causal decoders.
        windowed: in layers with a sliding window, only tokens whose window reaches the prefix attend to it. By default every
            token does, because a decoder classifies its last token, which may be far from the prefix.

    Shape:
        the prefix has the shape [P, sum over chosen layers of Hk * (Dk + Dv)], for Hk key-value heads with keys of size Dk and
        values of size Dv; an encoder-decoder has three prefixes.

    Raises:
        OptionError: an option is wrong, or names a layer that the model does not have.
        UnsupportedMethodError: softhooks cannot add a key-value prefix to the model's attention.
    """

    kind: ClassVar[str] = "p_tuning_v2"

    layers: Iterable[int] | None = field(default=None, kw_only=True)
    dropout: float = field(default=0.1, kw_only=True)
    windowed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None:
            return
        given: Any = self.layers
        layers = tuple(given) if isinstance(given, Iterable) else ()
        if not layers or not all(type(layer) is int for layer in layers) or len(set(layers)) < len(layers):
            raise OptionError(
                f"layers is {given!r}; it must be a list of distinct whole numbers, such as [0, 1] or range(-12, 0)."
            )
        object.__setattr__(self, "layers", layers)

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """Return the chosen layers, in the model's order."""
        sites = stack.sites_of(role)
        if self.layers is None:
            return sites
        count = len(sites)
        chosen = [layer + count if layer < 0 else layer for layer in self.layers]
        if not all(0 <= layer < count for layer in chosen) or len(set(chosen)) < len(chosen):
            raise OptionError(
                f"`layers` is {list(self.layers)}; it must contain only layers of the model, each once.",
                "Count layers from 0, or from the top with negative numbers (-1 is the top layer).",
                layers=list(self.layers),
                model=f"{type(stack.module).__name__}, {count} layers with {role}-attention: {-count} to {count - 1}",
            )
        return [site for place, site in enumerate(sites) if place in chosen]
