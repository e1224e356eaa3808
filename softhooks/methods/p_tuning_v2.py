"""P-tuning v2: deep prompts for understanding tasks, with a trained head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from softhooks.errors import OptionError
from softhooks.methods.deep_prefix import DeepPrefix

if TYPE_CHECKING:
    from softhooks.backbone.stack import Role, Site, Stack


@dataclass(frozen=True)
class PTuningV2(DeepPrefix):
    """P-tuning v2: P virtual keys and values in every layer, or in chosen ones, beside a trained head.

    Made for heads that classify a text or its tokens, or extract spans, on encoders and decoders; `attach` trains a copy of the
    head with the prompt. Spans and token labels keep the text's own columns.

    Start from a learning rate of 5e-3 with AdamW (the paper: 5e-3 to 6e-2) and 8 to 128 virtual tokens; hard tagging tasks want
    the most.

    Source: Liu et al. 2021, arXiv:2110.07602. Differs: dropout draws one mask for all rows of a batch, as the prefix is computed
    once; the authors' BERT places a text's first token at position P, ours leaves an encoder's positions alone unless
    `shift_positions=True`; the MLP is fitted to its start by least squares.

    Args:
        num_virtual_tokens: P.
        layers: which layers get a prompt, counted in each stack from 0, or from the top with -1; `range(-12, 0)` are the top
            twelve. None: every layer. The others are left as they are.
        projection: train an MLP that makes the prefix; only its result is saved.
        hidden_size: m, of the MLP.
        dropout: on the prefix.
        shift_positions: whether the text's positions start at P. None: yes in causal decoders, no elsewhere.
        windowed: whether sliding layers of a decoder see the prefix as tokens at the positions before the text, as a cache
            would. A deep prompt stands for no tokens, and the token that is classified comes last; so every token sees all of it.

    Shape:
        the encoder returns [P, sum over chosen layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or names a layer that the model does not have.
        UnsupportedMethodError: the model's attention cannot be entered.
    """

    kind: ClassVar[str] = "p_tuning_v2"

    layers: Iterable[int] | None = field(default=None, kw_only=True)
    dropout: float = field(default=0.1, kw_only=True)
    windowed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options, and keep the layers as a tuple."""
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
        """The sites of the chosen layers, in the model's order.

        Raises:
            OptionError: the stack has no such layer, or the choice names one twice.
        """
        sites = stack.sites_of(role)
        if self.layers is None:
            return sites
        count = len(sites)
        chosen = [layer + count if layer < 0 else layer for layer in self.layers]
        if not all(0 <= layer < count for layer in chosen) or len(set(chosen)) < len(chosen):
            raise OptionError(
                "`layers` must name layers that the model has, each once.",
                "Count from 0, or from the top with -1.",
                layers=list(self.layers),
                model=f"{type(stack.module).__name__}, {count} layers with {role}-attention: {-count} to {count - 1}",
            )
        return [site for place, site in enumerate(sites) if place in chosen]
