"""Cosine similarity of a prompt to other prompts, and to words of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.compat.sharding import is_sharded_model
from softhooks.errors import OptionError, PromptMismatchError, UnsupportedModeError
from softhooks.layout.tokenizing import tokenizer_of
from softhooks.methods.from_prompt import rows_of
from softhooks.prompt import SoftPrompt
from softhooks.switch import disabled

_BLOCK = 8192
"""The number of words that are compared with a prompt at once."""


def most_similar(
    prompts: Mapping[str, str | Path | Tensor | SoftPrompt] | Sequence[str], to: str | Path | Tensor | SoftPrompt
) -> list[tuple[str, float]]:
    """Rank prompts by the cosine similarity of their mean virtual token to that of the prompt `to`.

    To choose a prompt to start from, train a prompt for the new task for a short time, rank the saved prompts of other tasks, and
    start a new training run from the most similar one with `PromptTuning(init="prompt", init_from=...)`.

    Source: Vu et al. 2022 (SPoT), arXiv:2110.07904.

    Args:
        prompts: prompts of one base model by name, or a list of their directories. Their lengths may differ.
        to: the prompt to compare them with.

    Returns:
        each name with its cosine similarity, in descending order.

    Raises:
        OptionError: there are no prompts, or a prompt does not consist of embeddings.
        PromptMismatchError: the embedding sizes of the prompts differ, so they belong to different models.
    """
    named: Mapping[str, Any] = prompts if isinstance(prompts, Mapping) else {str(source): source for source in prompts}
    if isinstance(prompts, str) or not named:
        raise OptionError(f"`prompts` is {prompts!r}; pass one or more prompts, as a list or as a dict keyed by name.")
    goal = rows_of(to, "be compared with prompts").mean(0).cpu()
    pooled = {name: rows_of(source, "be compared with prompts").mean(0).cpu() for name, source in named.items()}
    foreign = {name: list(mean.shape) for name, mean in pooled.items() if mean.shape != goal.shape}
    if foreign:
        raise PromptMismatchError(
            "some prompts and the prompt `to` have different embedding sizes, so they belong to different base models.",
            "Remove these prompts from `prompts`.",
            to=f"width {list(goal.shape)}",
            prompts=foreign,
        )
    cosines = {name: float(functional.cosine_similarity(mean, goal, dim=0)) for name, mean in pooled.items()}
    return sorted(cosines.items(), key=lambda item: -item[1])


class Word(NamedTuple):
    """A token of the vocabulary, and the cosine similarity of its embedding to a virtual token."""

    id: int
    token: str
    cosine: float


@torch.no_grad()
def nearest_words(prompt: SoftPrompt, tokenizer: Any, count: int = 5) -> list[list[Word]]:
    """Find the tokens whose embeddings have the highest cosine similarity to each virtual token.

    The tokens show how close a prompt still is to the words that it was initialized from, but not necessarily what it means.

    Args:
        prompt: a prompt that consists of embeddings.
        tokenizer: the model's tokenizer or its name.
        count: the number of words for each virtual token.

    Returns:
        for each virtual token, a list of the nearest words in descending order of similarity.

    Raises:
        OptionError: the prompt does not consist of embeddings, or `count` is not between 1 and the size of the vocabulary.
        UnsupportedModeError: the model is sharded, so no process has the whole vocabulary.
    """
    if is_sharded_model(prompt.model):
        raise UnsupportedModeError(
            "the model is sharded, so no process has the whole vocabulary; save the prompt, and load it in a single process."
        )
    rows, known = rows_of(prompt, "be compared with words"), tokenizer_of(tokenizer)
    structure = prompt.prompted_model.structure
    size = min(structure.vocabulary, len(known))
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= size:
        raise OptionError(f"`count` is {count!r}; it must be an integer from 1 to {size}, the size of the vocabulary.")
    goal = functional.normalize(rows, dim=1)
    best, ids = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
    with disabled(prompt.model):
        for start in range(0, size, _BLOCK):
            some = torch.arange(start, min(start + _BLOCK, size))
            near = goal @ functional.normalize(embed_ids(structure, some), dim=1).to(goal).T
            best, ids = torch.cat([best, near], 1), torch.cat([ids, some.to(ids).expand(len(rows), -1)], 1)
            # The sort is stable, so ties stay in the order of the ids.
            order = torch.sort(best, dim=1, descending=True, stable=True).indices[:, :count]
            best, ids = best.gather(1, order), ids.gather(1, order)
    tokens = [known.convert_ids_to_tokens(row) for row in ids.tolist()]
    return [
        [Word(*word) for word in zip(*row, strict=True)]
        for row in zip(ids.tolist(), tokens, best.tolist(), strict=True)
    ]
