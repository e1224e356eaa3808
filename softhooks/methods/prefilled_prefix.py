"""The base class of context tuning and cartridges: a prefix that starts as the keys and values of a text."""

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
    """A method whose prompt starts as the keys and values of a text, as if that text came before each row."""

    enters: ClassVar[Literal["embeddings", "attention"]] = "attention"
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"shift_positions": (True, False), "windowed": (True,)}

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Shift positions if the model takes positions; sliding windows apply to the prefix as to tokens."""
        stack = structure.entry
        shift = stack.causal and (stack.positions.can_shift or stack.injection == "cache")
        return {"shift_positions": shift, "windowed": True}

    @staticmethod
    def prefill(structure: ModelStructure, ids: Sequence[int]) -> dict[str, Tensor]:
        """Run a text through the frozen model and return its keys and values. -> {group: [P, numbers]}."""
        require_sites(structure)
        tokens = torch.tensor(list(ids), dtype=torch.long)
        embed_ids(structure, tokens)  # refuses ids outside the vocabulary
        from softhooks.inject.text_key_values import key_values_of  # imports transformers

        return key_values_of(structure, tokens)


def ids_of(text: Any, tokenizer: Any, option: str) -> tuple[int, ...]:
    """Return the token ids of a text, without special tokens. If `text` is already ids, return them unchanged."""
    if isinstance(text, str):
        return tuple(tokenize(text, tokenizer, option))
    ids = text.tolist() if isinstance(text, Tensor) else list(text) if isinstance(text, Sequence) else []
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise OptionError(f"{option} must be a text or a list of one id or more; it is {text!r}.")
    return tuple(ids)


def bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return a list with the id of the tokenizer's BOS token, or an empty list if it has none."""
    first = getattr(tokenizer_of(tokenizer), "bos_token_id", None)
    return () if first is None else (int(first),)
