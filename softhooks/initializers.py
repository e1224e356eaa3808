"""Where prompts start: random numbers, words of the vocabulary, a text, labels, the keys and values of a text.

Rows are what the model's own embedding module returns, so that a scale inside it (Gemma) is part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.anatomy import Anatomy, Stack, at_rest
from softhooks.errors import OptionError, PromptMismatchError
from softhooks.groups import groups_of
from softhooks.inject.caches import ListeningCache
from softhooks.inject.interface import marked
from softhooks.inject.keyvalues import flatten
from softhooks.inject.shared import CapturePass
from softhooks.trainer.offload import device_of, read
from softhooks.trainer.sharding import full

Words = Sequence[int | None] | None
"""The id of the word that each row is, if it is one; see `PromptEncoder.start_ids`."""

COMMON_IDS = 5000
"""The first ids of a vocabulary are its most frequent words; Lester et al. draw from these."""

_SCANNED = 8192
"""How many words are compared with rows at a time."""


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
            "the ids of an initial text must be in the model's vocabulary.",
            "Give the tokenizer that belongs to the model.",
            ids=f"{int(ids.min())} to {int(ids.max())}",
            vocabulary=f"0 to {anatomy.vocabulary - 1}",
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
            "initialising from text needs a tokenizer.",
            "Pass `tokenizer=`: the model's own, or its name.",
            **{option: repr(text)},
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


def given_rows(anatomy: Anatomy, count: int, tensor: Any) -> Tensor:
    """Take the rows that a user gives; those of the embedding's weight mean their words, also where a scale follows.

    Raises:
        PromptMismatchError: the shape is not [P, H].
    """
    rows = tensor_rows(anatomy, count, tensor)
    words = words_of_weight(anatomy, rows)
    found = [row for row, word in enumerate(words) if word is not None]
    if found:
        embedded = embed_ids(anatomy, [word for word in words if word is not None])
        rows = rows.index_put((torch.tensor(found, device=rows.device),), embedded.to(rows))
    return rows


@torch.no_grad()
def words_of_weight(anatomy: Anatomy, rows: Tensor) -> list[int | None]:
    """The word of each row that equals, number by number, a row of the embedding's weight and is no output of the embedding.

    Such rows exist only where the embedding does more than look rows up: Gemma's multiplies them by sqrt(H).

    Shape:
        rows [P, H] -> P ids
    """
    embedding = anatomy.entry.embedding
    weight = full(read(embedding, "weight", embedding.weight)).detach()  # type: ignore[arg-type]
    found: list[int | None] = [None] * len(rows)
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not weight.is_floating_point() or weight.is_meta:
        return found
    known = _words_with(weight, rows.to(weight.device))
    words = sorted({word for word in known if word is not None})
    if not words or torch.equal(embed_ids(anatomy, words), weight[words].float()):
        return found
    outputs = words_among(anatomy, rows)
    return [word if output is None else None for word, output in zip(known, outputs, strict=True)]


@torch.no_grad()
def words_among(anatomy: Anatomy, rows: Tensor) -> list[int | None]:
    """The id of each row that is a word's embedding, number by number; transformers finds ids behind embeddings so too.

    Shape:
        rows [P, H] -> P ids
    """
    found: list[int | None] = [None] * len(rows)
    for start in range(0, anatomy.vocabulary, _SCANNED):
        ids = range(start, min(start + _SCANNED, anatomy.vocabulary))
        table = embed_ids(anatomy, list(ids))
        here = _words_with(table, rows.to(table.device))
        found = [
            start + word if before is None and word is not None else before
            for before, word in zip(found, here, strict=True)
        ]
    return found


def _words_with(table: Tensor, rows: Tensor) -> list[int | None]:
    """The first row of a table that each row equals. [V, H], [P, H] -> P numbers."""
    found: list[int | None] = [None] * len(rows)
    for row, word in (rows[:, None, 0] == table[None, :, 0].float()).nonzero().tolist():
        if found[row] is None and torch.equal(rows[row], table[word].float()):
            found[row] = word
    return found


def tensor_rows(anatomy: Anatomy, count: int, tensor: Any, option: str = "init_tensor") -> Tensor:
    """Take another prompt's rows.

    Raises:
        PromptMismatchError: its shape is not [P, H].
    """
    rows = torch.as_tensor(tensor).detach().float()
    if tuple(rows.shape) != (count, anatomy.entry.width):
        raise PromptMismatchError(
            "the initial rows must be one a virtual token, as wide as the model's embeddings.",
            "Set num_virtual_tokens to their number, and take them from the same base model.",
            **{option: list(rows.shape)},
            expected=[count, anatomy.entry.width],
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
