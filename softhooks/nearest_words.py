"""What virtual tokens lie near: the words of the vocabulary that are the most similar to each row of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.compat.sharding import shards
from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.layout.tokenizing import tokenizer_of
from softhooks.similarity import rows_of
from softhooks.switch import disabled

if TYPE_CHECKING:
    from softhooks.prompt import SoftPrompt

_AT_ONCE = 8192
"""How many words are compared with a prompt at a time."""


_RULE = "words are near to a prompt only if it is rows of embeddings; keys and values lie in another space than words."


class Word(NamedTuple):
    """A word of the vocabulary, and how near it is to a virtual token."""

    id: int
    token: str
    cosine: float


@torch.no_grad()
def nearest_words(prompt: SoftPrompt, tokenizer: Any, count: int = 5) -> list[list[Word]]:
    """Find the words whose embeddings have the greatest cosine with each virtual token's row.

    They hint at what a prompt has kept of its start; that a prompt means what its nearest words mean is not said.

    Args:
        prompt: a prompt that folds to rows of embeddings.
        tokenizer: the model's tokenizer or its name.
        count: how many words for each virtual token.

    Returns:
        for each virtual token its words, the nearest first; of equal ones the first of the vocabulary.

    Raises:
        OptionError: the prompt enters as keys and values, or `count` is no number from 1 to the size of the vocabulary.
        UnsupportedModeError: the model is sharded, so that no process holds its vocabulary.
    """
    if shards(prompt.model):
        raise UnsupportedModeError(
            "the words nearest to a prompt need the whole vocabulary, and a sharded model's is in parts; save the prompt, load "
            "it onto the model in one process and ask there."
        )
    rows, known = rows_of(prompt, _RULE), tokenizer_of(tokenizer)
    structure = prompt.prompted_model.structure
    size = min(structure.vocabulary, len(known))
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
        raise OptionError(
            "`count` must be a number of words of the vocabulary.", "Ask for fewer.", count=count, words=size
        )
    goal = functional.normalize(rows, dim=1)
    best, ids = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
    with disabled(prompt.model):
        for start in range(0, size, _AT_ONCE):
            some = torch.arange(start, min(start + _AT_ONCE, size))
            near = goal @ functional.normalize(embed_ids(structure, some), dim=1).to(goal).T
            best, ids = _first(
                torch.cat([best, near], 1), torch.cat([ids, some.to(ids).expand(len(rows), -1)], 1), count
            )
    tokens = [known.convert_ids_to_tokens(row) for row in ids.tolist()]
    return [
        [Word(*word) for word in zip(*row, strict=True)]
        for row in zip(ids.tolist(), tokens, best.tolist(), strict=True)
    ]


def _first(cosines: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest of each row, in order; of equal ones those that stand first."""
    order = torch.sort(cosines, dim=1, descending=True, stable=True).indices[:, :count]
    return cosines.gather(1, order), ids.gather(1, order)
