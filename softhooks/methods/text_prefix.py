"""What context tuning and cartridges share: a prefix that starts as the keys and values of a text that the model has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from softhooks.backbone.entry_points import require_sites
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError
from softhooks.layout.tokenizing import tokenize, tokenizer_of
from softhooks.method import Method

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure


@dataclass(frozen=True)
class ReadPrefix(Method):
    """A method whose prompt is keys and values of a text, and stands where that text would stand: before the row's own."""

    enters: ClassVar[Literal["embeddings", "attention"]] = "attention"
    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"shift_positions": (True, False), "windowed": (True,)}

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Positions move behind the text wherever the model can be told so; sliding layers see it as tokens."""
        stack = structure.entry
        shift = stack.causal and (stack.positions.can_shift or stack.injection == "cache")
        return {"shift_positions": shift, "windowed": True}

    @staticmethod
    def read(structure: ModelStructure, ids: Sequence[int]) -> dict[str, Tensor]:
        """Run a text through the frozen model and take its keys and values. -> {group: [P, numbers]}."""
        require_sites(structure)
        tokens = torch.tensor(list(ids), dtype=torch.long)
        embed_ids(structure, tokens)  # refuses ids outside the vocabulary
        from softhooks.inject.text_key_values import key_values_of  # imports transformers

        return key_values_of(structure, tokens)


def ids_of(text: Any, tokenizer: Any, option: str) -> tuple[int, ...]:
    """The ids of a text, without special tokens; ids are taken as they are.

    Raises:
        OptionError: it is empty, neither text nor ids, or a text without a tokenizer.
    """
    if isinstance(text, str):
        return tuple(tokenize(text, tokenizer, option))
    ids = text.tolist() if isinstance(text, Tensor) else list(text) if isinstance(text, Sequence) else []
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise OptionError(f"{option} must be a text or a list of one id or more; it is {text!r}.")
    return tuple(ids)


def opening(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before every text: its BOS token, if it has one."""
    first = getattr(tokenizer_of(tokenizer), "bos_token_id", None)
    return () if first is None else (int(first),)
