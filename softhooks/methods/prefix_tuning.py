"""Prefix tuning: keys and values before those of the text, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError
from softhooks.layout.tokenizing import tokenize
from softhooks.method import choice
from softhooks.methods import initializers
from softhooks.methods.deep_prefix import DeepPrefix

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure


@dataclass(frozen=True)
class PrefixTuning(DeepPrefix):
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
        windowed: whether sliding layers of a decoder see the prefix as tokens at positions 0 to P-1, as a cache would; False
            shows the whole prefix to every token, as encoders do anyway.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or belongs to another `init`.
        UnsupportedMethodError: the model's attention cannot be entered.
    """

    kind: ClassVar[str] = "prefix_tuning"
    start_options: ClassVar[tuple[str, ...]] = ("init", "init_text", "init_ids")

    init: str = field(default="text", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_ids: Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        super().__post_init__()
        choice("init", self.init, ("text", "zero", "random"))
        if self.init != "text" and (self.init_text is not None or self.init_ids is not None):
            raise OptionError(f"init_text and init_ids belong to init='text'; init is {self.init!r}.")
        if self.init_text is not None and self.init_ids is not None:
            raise OptionError("init_text and init_ids say the same thing twice; give one of them.")
        if self.init_text is not None and self.tokenizer is None:
            raise OptionError(
                "init_text needs a tokenizer; none is given. Pass `tokenizer=`, or the ids as `init_ids=`."
            )

    def start(self, structure: ModelStructure) -> dict[str, Tensor]:
        """The keys and values that each group starts from, [P, numbers]."""
        if self.init == "text":
            from softhooks.inject.text_key_values import key_values_of  # imports transformers

            return key_values_of(structure, self._ids(structure))
        tables = super().start(structure)
        return tables if self.init == "random" else {group: torch.zeros_like(t) for group, t in tables.items()}

    def _ids(self, structure: ModelStructure) -> Tensor:
        count = self.num_virtual_tokens
        if self.init_ids is None and self.init_text is None:
            return initializers.vocabulary_ids(structure, count)
        ids = self.init_ids
        if ids is None:
            ids = tokenize(self.init_text or "", self.tokenizer, "init_text")
        if not len(ids):
            raise OptionError("init_ids must hold at least one id; it is empty.")
        repeated = torch.as_tensor(list(ids)).repeat(-(-count // len(ids)))[:count]
        embed_ids(structure, repeated)  # refuses ids outside the vocabulary
        return repeated
