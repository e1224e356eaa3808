"""Prefix tuning: trained keys and values before the text's keys and values, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError, check_choice
from softhooks.layout.tokenizing import tokenize
from softhooks.methods import initializers
from softhooks.methods.key_value_prefix import KeyValuePrefix
from softhooks.methods.scaled_prefix import ScaledPrefixEncoder
from softhooks.prompt_encoder import PromptEncoder

Init = Literal["text", "zero", "random"]


@dataclass(frozen=True)
class PrefixTuning(KeyValuePrefix):
    """Prefix tuning: P trained keys and values in every attention layer.

    An encoder-decoder gets three independent prefixes: in the encoder's self-attention, the decoder's self-attention, and
    cross-attention.

    Start with AdamW and a learning rate of 3e-2 without the MLP, or 5e-4 with it (the paper uses 5e-5 with P = 10, m = 512 and
    many epochs).

    Source: Li & Liang 2021, arXiv:2101.00190. Differences: there is no MLP by default, because a prefix initialized from real
    words trains stably without one; the MLP is fitted to the initial prefix by least squares instead of 500 training steps; we
    add `windowed` and `scaled`.

    Args:
        num_virtual_tokens: P.
        projection: compute the prefix with a trained MLP; only the prefix is saved.
        hidden_size: m, the width of the MLP.
        dropout: the dropout probability of the prefix.
        init: the initial prefix:
            `text`, by far the best: the keys and values that the model computes for `init_text` or `init_ids`, repeated or cut
            to P tokens, or for words sampled from the vocabulary if neither is given (without token ids, the same as `random`);
            `zero`: zeros;
            `random`: N(0, 0.02).
        init_text, init_ids: the text for `init="text"`, as a string or as token ids; at most its first P tokens are used.
        tokenizer: the model's tokenizer or its name; required for `init_text`.
        scaled: train each number of the prefix in units of its standard deviation over the initial virtual tokens, so that one
            learning rate suits all layers. It needs `init="text"` and at least two virtual tokens, and cannot be combined with
            `projection`. Saved prompts contain the prefix itself; if one is loaded for further training, the units are those
            of the loaded prefix.
        shift_positions: start the text's position ids at P; by default, only in causal decoders.
        windowed: in layers with a sliding window, only tokens whose window reaches the prefix (positions 0 to P-1) attend to it.
            If False, and always in encoders, every token attends to the whole prefix.

    Shape:
        each prefix has the shape [P, sum over layers of Hk * (Dk + Dv)], for Hk key-value heads with keys of size Dk and values
        of size Dv.

    Raises:
        OptionError: an option is wrong, or not accepted with this `init`.
        UnsupportedMethodError: softhooks cannot add a key-value prefix to the model's attention.
    """

    kind: ClassVar[str] = "prefix_tuning"
    init_options: ClassVar[tuple[str, ...]] = ("init", "init_text", "init_ids")

    init: Init = field(default="text", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_ids: Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    scaled: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, get_args(Init))
        if self.init != "text" and (self.init_text is not None or self.init_ids is not None):
            raise OptionError(f"init_text or init_ids is given with init={self.init!r}; only init='text' accepts them.")
        if self.init_text is not None and self.init_ids is not None:
            raise OptionError("init_text and init_ids are both given; pass one of them.")
        if self.init_text is not None and self.tokenizer is None:
            raise OptionError(
                "init_text needs a tokenizer, but none is given. Pass `tokenizer=`, or pass the ids as `init_ids=`."
            )
        if self.scaled:
            self._check_scaled()

    def _check_scaled(self) -> None:
        if self.projection:
            raise OptionError(
                "scaled and projection are both True; the MLP's output has no units. Leave one of them out."
            )
        if self.init != "text":
            raise OptionError(
                f"scaled is True with init={self.init!r}; only init='text' gives virtual tokens whose spread can be measured."
            )
        if self.num_virtual_tokens < 2:
            raise OptionError(
                "scaled is True with 1 virtual token, which has no spread; use at least 2, or leave scaled out."
            )

    def table_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a prefix without an MLP."""
        return ScaledPrefixEncoder(tables, self.dropout) if self.scaled else super().table_encoder(tables)

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make an encoder with which a saved prefix can be trained further."""
        return self.table_encoder(tables) if self.scaled else super().rebuild(structure, tables)

    def initial_tables(self, structure: ModelStructure) -> dict[str, Tensor]:
        """Return the initial keys and values for each group of attention layers, [P, N]."""
        if self.init == "text" and not structure.embeds_tokens:
            self._check_without_tokens(structure)
            return super().initial_tables(structure)
        if self.init == "text":
            from softhooks.inject.capture import key_values_of  # imports transformers

            return key_values_of(structure, self._ids(structure))
        tables = super().initial_tables(structure)
        return tables if self.init == "random" else {group: torch.zeros_like(t) for group, t in tables.items()}

    def _check_without_tokens(self, structure: ModelStructure) -> None:
        given = next((name for name in ("init_text", "init_ids", "scaled") if getattr(self, name)), None)
        if given is not None:
            raise OptionError(
                f"{given} is given, but {type(structure.entry.module).__name__} takes `{structure.entry.features}` instead of "
                "token ids, so the prefix cannot start from words.",
                f"Leave `{given}` out; the prefix then starts from small random numbers.",
            )

    def _ids(self, structure: ModelStructure) -> Tensor:
        count = self.num_virtual_tokens
        if self.init_ids is None and self.init_text is None:
            return initializers.vocabulary_ids(structure, count)
        ids = self.init_ids
        if ids is None:
            ids = tokenize(self.init_text or "", self.tokenizer, "init_text")
        if not len(ids):
            raise OptionError("init_ids is empty; it must contain at least one id.")
        repeated = torch.as_tensor(list(ids)).repeat(-(-count // len(ids)))[:count]
        embed_ids(structure, repeated)  # refuses ids outside the vocabulary
        return repeated
