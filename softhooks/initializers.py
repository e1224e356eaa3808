"""Where prompts start: random numbers, words of the vocabulary, a text, labels, the keys and values of a text.

Rows are what the model's own embedding module returns, so that a scale inside it (Gemma) is part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.anatomy import Anatomy, Stack, at_rest
from softhooks.errors import OptionError, PromptMismatchError, explain
from softhooks.groups import groups_of
from softhooks.inject.caches import ListeningCache
from softhooks.inject.interface import marked
from softhooks.inject.keyvalues import flatten
from softhooks.inject.shared import CapturePass
from softhooks.trainer.offload import device_of

Words = Sequence[int | None] | None
"""The id of the word that each row is, if it is one; see `PromptEncoder.start_ids`."""

COMMON_IDS = 5000
"""The first ids of a vocabulary are its most frequent words; Lester et al. draw from these."""


def random_rows(anatomy: Anatomy, count: int) -> Tensor:
    """Draw from U[-0.5, 0.5]. -> [P, H]."""
    return torch.rand(count, anatomy.entry.width) - 0.5


def vocabulary_ids(anatomy: Anatomy, count: int, whole: bool = False) -> Tensor:
    """Draw ids of the vocabulary, without replacement where it is large enough. -> [P]."""
    size = anatomy.vocabulary if whole or count > COMMON_IDS else min(anatomy.vocabulary, COMMON_IDS)
    if count > size:
        return torch.randint(size, (count,))
    return torch.randperm(size)[:count]


def embed_ids(anatomy: Anatomy, ids: Tensor | Sequence[int]) -> Tensor:
    """Look ids up in the model's embedding. [P] -> [P, H]."""
    stack = anatomy.entry
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= anatomy.vocabulary):
        raise OptionError(
            explain(
                "the ids of an initial text must be in the model's vocabulary.",
                "Give the tokenizer that belongs to the model.",
                ids=f"{int(ids.min())} to {int(ids.max())}",
                vocabulary=f"0 to {anatomy.vocabulary - 1}",
            )
        )
    with at_rest(stack.embedding):
        rows: Tensor = stack.embedding(ids[None].to(device_of(stack.embedding)))[0]
    return rows.float()


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer itself, also where its name is given."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def tokenize(text: str, tokenizer: Any, option: str) -> list[int]:
    """Split a text into ids, without special tokens.

    Raises:
        OptionError: no tokenizer was given, or the text is empty.
    """
    if tokenizer is None:
        raise OptionError(
            explain(
                "initialising from text needs a tokenizer.",
                "Pass `tokenizer=`: the model's own, or its name.",
                **{option: repr(text)},
            )
        )
    ids = tokenizer_of(tokenizer)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise OptionError(f"{option} must hold at least one token; the tokenizer finds none in {text!r}.")
    return [int(i) for i in ids]


def filled(anatomy: Anatomy, count: int, ids: Sequence[int]) -> list[int]:
    """Take P ids of a text; what it lacks comes from the vocabulary."""
    known = list(ids[:count])
    missing = count - len(known)
    return known + (vocabulary_ids(anatomy, missing).tolist() if missing else [])


def label_rows(anatomy: Anatomy, count: int, labels: Sequence[str], tokenizer: Any) -> tuple[Tensor, Words]:
    """Take one row a label, the mean of its tokens' rows; what is missing comes from the vocabulary.

    Returns:
        the rows, [P, H], and the id of each that is one word.
    """
    if isinstance(labels, str) or not labels:
        raise OptionError(f"init_labels must be a list of one label or more; it is {labels!r}.")
    ids = [tokenize(label, tokenizer, "init_labels") for label in labels]
    rows = torch.stack([embed_ids(anatomy, label).mean(0) for label in ids])[:count]
    words: list[int | None] = [label[0] if len(label) == 1 else None for label in ids[:count]]
    missing = count - rows.shape[0]
    if not missing:
        return rows, words
    more = vocabulary_ids(anatomy, missing)
    return torch.cat([rows, embed_ids(anatomy, more).to(rows)]), [*words, *more.tolist()]


def tensor_rows(anatomy: Anatomy, count: int, tensor: Any, option: str = "init_tensor") -> Tensor:
    """Take another prompt's rows.

    Raises:
        PromptMismatchError: its shape is not [P, H].
    """
    rows = torch.as_tensor(tensor).detach().float()
    if tuple(rows.shape) != (count, anatomy.entry.width):
        raise PromptMismatchError(
            explain(
                "the initial rows must be one a virtual token, as wide as the model's embeddings.",
                "Set num_virtual_tokens to their number, and take them from the same base model.",
                **{option: list(rows.shape)},
                expected=[count, anatomy.entry.width],
            )
        )
    return rows


def key_values_of(anatomy: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """Run a text through the frozen model and take its keys and values, for every group.

    In an encoder-decoder the text goes through both sides. Every token is kept, also in sliding layers.

    Shape:
        ids [P] -> {group: [P, numbers]}
    """
    ids = ids.to(device_of(anatomy.entry.embedding))[None]
    groups = groups_of(anatomy)
    captured: dict[str, Tensor] = {}
    encoded: Tensor | None = None
    for stack in anatomy.stacks:
        with at_rest(stack.module), marked(stack):
            keys, values, output = _capture(stack, ids, encoded)
        encoded = output
        for group, (owner, role) in groups.items():
            if owner is stack:
                captured[group] = flatten(keys[role], values[role], stack.sites_of(role)).float()
    return captured


def _capture(stack: Stack, ids: Tensor, encoded: Tensor | None) -> tuple[Any, Any, Tensor]:
    """Run one stack over [1, P] ids and note its keys and values by role and index."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if encoded is not None:
        inputs["encoder_hidden_states"] = encoded
    if "use_cache" in stack.parameters and stack.causal:
        inputs["use_cache"] = False
    cache = ListeningCache() if stack.through == "cache" else None
    if cache is not None:
        inputs["past_key_values"] = cache
    live = CapturePass(stack)
    outer, stack.live = stack.live, live
    try:
        output = stack.module(**inputs)
    finally:
        stack.live = outer
    state: Tensor = output[0]
    if cache is not None:
        heard = cache.heard
        return {"self": {i: k for i, (k, _) in heard.items()}}, {"self": {i: v for i, (_, v) in heard.items()}}, state
    return live.keys, live.values, state
