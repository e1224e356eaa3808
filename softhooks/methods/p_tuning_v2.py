"""P-tuning v2: a key-value prefix for classification and tagging, with a trained head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from softhooks.backbone.stack import Role, Site, Stack
from softhooks.errors import OptionError
from softhooks.methods.key_value_prefix import KeyValuePrefix


@dataclass(frozen=True)
class PTuningV2(KeyValuePrefix):
    """P-tuning v2: P virtual keys and values in every layer, or in chosen layers, with a trained head.

    For heads that classify a text or its tokens, or extract spans, on encoders and decoders; `attach` trains a copy of the head
    with the prompt. Spans and token labels refer to the columns of the text, as without a prompt.

    Start with AdamW, a learning rate of 5e-3 (the paper: 5e-3 to 6e-2) and 8 to 128 virtual tokens; hard tagging tasks need the
    most.

    Source: Liu et al. 2021, arXiv:2110.07602. Differs: dropout uses one mask for all rows of a batch, as the prefix is computed
    once; the authors' BERT gives a text's first token the position P, ours does not shift an encoder's positions unless
    `shift_positions=True`; the MLP is fitted to the initial prefix by least squares.

    Args:
        num_virtual_tokens: P.
        layers: the layers that get a prompt, counted in each stack from 0, or from the top with -1; `range(-12, 0)` are the top
            twelve. None: every layer. All other layers are unchanged.
        projection: compute the prefix with an MLP, which is trained; only the prefix is saved.
        hidden_size: m, the width of the MLP.
        dropout: dropout on the prefix.
        shift_positions: start the text's positions at P. None shifts in causal decoders only.
        windowed: in layers with a sliding window, show the prefix only to tokens within the window, as a cache would. The
            default shows all of it to every token, as a deep prompt does not stand for tokens and the token that is classified
            comes last.

    Shape:
        the encoder returns [P, sum over chosen layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or names a layer that the model does not have.
        UnsupportedMethodError: prompts cannot enter the model's attention.
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
        whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
        if not layers or not whole or len(set(layers)) < len(layers):
            raise OptionError(
                f"layers must be distinct whole numbers, one or more, such as [0, 1] or range(-12, 0); it is {given!r}."
            )
        object.__setattr__(self, "layers", layers)

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """Return the attention layers that are chosen, in the model's order."""
        sites = stack.sites_of(role)
        if self.layers is None:
            return sites
        count = len(sites)
        chosen = [layer + count if layer < 0 else layer for layer in self.layers]
        if not all(0 <= layer < count for layer in chosen) or len(set(chosen)) < len(chosen):
            raise OptionError(
                f"`layers` is {list(self.layers)}; it must name layers that the model has, each once.",
                "Count from 0, or from the top with -1.",
                layers=list(self.layers),
                model=f"{type(stack.module).__name__}, {count} layers with {role}-attention: {-count} to {count - 1}",
            )
        return [site for place, site in enumerate(sites) if place in chosen]
