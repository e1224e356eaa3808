"""Other ways to compute a prompt from parameters, to find out whether they are better; they are not part of softhooks.

They begin as the same prompt as `PromptTuning` with the same `init`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import softhooks
from benchmarks.quality.setup import Prepared, Setup
from benchmarks.quality.softhooks_methods import starting_words, with_method, with_options
from softhooks.backbone.stack import ModelStructure
from softhooks.methods import initializers
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder

WORDS = 128
"""The words whose embeddings a superposition combines."""


class SuperposedEncoder(PromptEncoder):
    """Computes each virtual token as a weighted sum of frozen embeddings: the initial ones, and those of words.

    Args:
        rows: the initial embeddings, [P, H].
        words: the embeddings of words, [m, H].
    """

    groups = (EMBEDDINGS,)

    def __init__(self, rows: Tensor, words: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat([rows, words]).detach().float())
        self.weights = nn.Parameter(torch.eye(len(rows), len(rows) + len(words)))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the prompt, [P, H]."""
        rows: Tensor = self.weights @ self.table
        return rows


class NormalizedEncoder(PromptEncoder):
    """Computes embeddings whose lengths stay those of the initial embeddings; only their directions are trained.

    Args:
        rows: the initial embeddings, [P, H].
    """

    groups = (EMBEDDINGS,)

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.register_buffer("lengths", self.rows.detach().norm(dim=1, keepdim=True))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the prompt, [P, H]."""
        return nn.functional.normalize(self.rows, dim=1) * self.lengths


@dataclass(frozen=True)
class SuperposedPromptTuning(softhooks.PromptTuning):
    """Prompt tuning with weights of word embeddings as parameters.

    Source: SuperPos-Prompt, arXiv:2406.05279. Difference: the initial embeddings are among the words, and the weights begin as
    1 for these and 0 for the others.

    Args:
        words: m, the number of words, sampled from the vocabulary.
    """

    words: int = field(default=WORDS, kw_only=True)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with the initial embeddings."""
        rows, _ = self.initial_rows(structure)
        ids = initializers.vocabulary_ids(structure, self.words, whole=self.whole_vocabulary)
        return SuperposedEncoder(rows, initializers.embed_ids(structure, ids))


@dataclass(frozen=True)
class NormalizedPromptTuning(softhooks.PromptTuning):
    """Prompt tuning of directions."""

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with the initial embeddings."""
        return NormalizedEncoder(self.initial_rows(structure)[0])


def superposed_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prompt of weights that starts as the task's instruction."""
    return with_method(model, SuperposedPromptTuning(**with_options(setup, starting_words(setup))), setup)


def normalized_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prompt of directions that starts as the task's instruction."""
    return with_method(model, NormalizedPromptTuning(**with_options(setup, starting_words(setup))), setup)
