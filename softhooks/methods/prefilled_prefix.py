"""The base class of context tuning and cartridges: a prefix initialized with the keys and values of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from softhooks.backbone.attention_groups import require_sites
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError
from softhooks.layout.tokenizing import tokenize, tokenizer_of
from softhooks.method import Method


@dataclass(frozen=True)
class PrefilledPrefix(Method):
    """A method whose prompt is initialized with the keys and values of given tokens, as if they came before each row."""

    enters: ClassVar[Literal["embeddings", "attention"]] = "attention"
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"shift_positions": (True, False), "windowed": (True,)}

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return whether the prefix shifts the text's positions; sliding windows always apply to the prefix."""
        stack = structure.entry
        shift = stack.causal and (stack.positions.can_shift or stack.injection == "cache")
        return {"shift_positions": shift, "windowed": True}

    @staticmethod
    def prefill(structure: ModelStructure, ids: Sequence[int]) -> dict[str, Tensor]:
        """Run the frozen model on token ids, and return the keys and values for each group of attention layers, [P, N]."""
        require_sites(structure)
        tokens = torch.tensor(list(ids), dtype=torch.long)
        embed_ids(structure, tokens)  # refuses ids outside the vocabulary
        from softhooks.inject.capture import key_values_of  # imports transformers

        return key_values_of(structure, tokens)


def ids_of(text: Any, tokenizer: Any, option: str) -> tuple[int, ...]:
    """Tokenize a string without special tokens, or check a list of token ids."""
    if isinstance(text, str):
        return tuple(tokenize(text, tokenizer, option))
    ids = text.tolist() if isinstance(text, Tensor) else list(text) if isinstance(text, Sequence) else []
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise OptionError(f"{option} is {text!r}; it must be a string or a list of at least one token id.")
    return tuple(ids)


def bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the id of the tokenizer's BOS token in a tuple, which is empty if the tokenizer has none."""
    first = getattr(tokenizer_of(tokenizer), "bos_token_id", None)
    return () if first is None else (int(first),)
