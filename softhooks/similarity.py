"""What a prompt is similar to: other prompts of the same base model, and words of the vocabulary.

Source: Vu et al. 2022 (SPoT), arXiv:2110.07904: a prompt tuned on a source task starts a target's; which source is best is told
by the cosine of the prompts' mean-pooled tokens, the target's taken early in its own tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.compat.sharding import shards
from softhooks.errors import OptionError, PromptMismatchError, UnsupportedModeError
from softhooks.layout.tokenizing import tokenizer_of
from softhooks.methods.from_prompt import rows_of
from softhooks.prompt import SoftPrompt
from softhooks.switch import disabled

_COMPARED = "prompts can be compared only if they fold to rows of embeddings."
_WORDS = "words are near to a prompt only if it is rows of embeddings; keys and values lie in another space than words."
_AT_ONCE = 8192
"""How many words are compared with a prompt at a time."""


def most_similar(
    prompts: Mapping[str, str | Path | Tensor | SoftPrompt] | Sequence[str], to: str | Path | Tensor | SoftPrompt
) -> list[tuple[str, float]]:
    """Rank prompts by how near they are to one: the cosine of their mean-pooled tokens.

    Tune the target's own prompt for a short while, ask which stored prompt is the nearest, and start from that with
    `PromptTuning(init="prompt", init_from=...)`.

    Args:
        prompts: prompts of one base model by name, or a list of their directories; their lengths may differ.
        to: the prompt to compare with.

    Returns:
        each name with its cosine, the nearest first.

    Raises:
        OptionError: none is given, or one of them does not fold to rows of embeddings.
        PromptMismatchError: their widths differ, so that they are of different models.
    """
    named: Mapping[str, Any] = prompts if isinstance(prompts, Mapping) else {str(source): source for source in prompts}
    if isinstance(prompts, str) or not named:
        raise OptionError(f"prompts must be one or more, by name or in a list; it is {prompts!r}.")
    goal = rows_of(to, _COMPARED).mean(0).cpu()
    pooled = {name: rows_of(source, _COMPARED).mean(0).cpu() for name, source in named.items()}
    foreign = {name: list(mean.shape) for name, mean in pooled.items() if mean.shape != goal.shape}
    if foreign:
        raise PromptMismatchError(
            "prompts can be compared only if they are of one base model.",
            "Leave the others out.",
            to=f"width {list(goal.shape)}",
            prompts=foreign,
        )
    cosines = {name: float(functional.cosine_similarity(mean, goal, dim=0)) for name, mean in pooled.items()}
    return sorted(cosines.items(), key=lambda item: -item[1])


# --- words ------------------------------------------------------------------------------------------------------------


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
    rows, known = rows_of(prompt, _WORDS), tokenizer_of(tokenizer)
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
