"""CPT's loss computed by hand on the bare model, one row and one token at a time, without softhooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import zoo
from torch import Tensor

from softhooks import ContextAwarePromptTuning

IDS = (zoo.BOS, 20, 41, 42, 21, 43, 44, 30, 20, 51, 52, 21, 53, 30, 20, 61, 21, 63, 64, 65, 30)
TYPES = (0, 1, 2, 2, 3, 4, 4, 0, 5, 6, 6, 7, 8, 0, 9, 10, 11, 12, 12, 12, 0)
P = len(IDS)
OWN = (range(1, 8), range(8, 14), range(14, 21))
"""The tokens of each example, with the separator after it."""

MOVABLE = [place for place, kind in enumerate(TYPES) if kind % 4]


def method(**options: Any) -> ContextAwarePromptTuning:
    """Three examples with labels of two, one and three tokens."""
    return ContextAwarePromptTuning(**{"context_ids": IDS, "token_types": TYPES, **options})


def stirred(prompt: Any, size: float = 0.3) -> Tensor:
    """Set a prompt's deltas to random values; return its rows, computed by hand, [P, H]."""
    with torch.no_grad():
        prompt.encoder.delta.normal_(std=size)
    return table_of(prompt)


def table_of(prompt: Any) -> Tensor:
    """The rows of a context, computed by hand from the model's embeddings and the deltas."""
    model = prompt.model
    rows = model.get_input_embeddings()(torch.tensor(IDS)).detach().float().clone()
    rows[MOVABLE] += prompt.encoder.delta.detach()
    return rows.requires_grad_()


def logits_of(model: Any, table: Tensor, ids: Tensor, hide: Sequence[int] = ()) -> Tensor:
    """The logits of a context and one unpadded row after it, which does not see some of the context. -> [P + T, V]."""
    embedded = torch.cat([table, model.get_input_embeddings()(ids)])[None]
    length, context = embedded.shape[1], table.shape[0]
    call = {}
    if len(hide):
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[context:, list(hide)] = False
        call["attention_mask"] = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        call["position_ids"] = torch.arange(length)[None]
    return model(inputs_embeds=embedded, use_cache=False, **call).logits[0]


def row_loss(
    logits: Tensor, labels: Tensor, decay: float = 1.0, context: bool = True, own: int = -1
) -> tuple[Tensor, int]:
    """The loss of one row, and how many label tokens its text has."""
    chances = logits.float().log_softmax(-1)
    total, number = torch.zeros(()), 0
    for place, kind in enumerate(TYPES):
        example = (kind - 1) // 4
        if context and kind and kind % 4 == 0 and example != own:
            total = total - chances[place - 1, IDS[place]] * decay ** (3 - example)
            number += 1
    found = 0
    for column, label in enumerate(labels.tolist()):
        if column and label != -100:
            total = total - chances[P + column - 1, label]
            found += 1
    return total / (number + found), found


def loss_of(
    model: Any,
    table: Tensor,
    rows: Sequence[Tensor],
    labels: Sequence[Tensor],
    examples: Sequence[int] = (),
    **options: Any,
) -> Tensor:
    """The loss of a batch: rows weighted by the label tokens of their texts."""
    total, number = torch.zeros(()), 0
    for i, (ids, wanted) in enumerate(zip(rows, labels, strict=True)):
        own = examples[i] if examples else -1
        hide = OWN[own] if own >= 0 else ()
        loss, found = row_loss(logits_of(model, table, ids, hide), wanted, own=own, **options)
        total, number = total + found * loss, number + found
    return total / number


def ragged(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of different lengths, with labels of different lengths at their ends."""
    rows = [zoo.text(1, length, seed=seed + length)[0] for length in (7, 4, 9, 5)]
    labels = []
    for row, count in zip(rows, (2, 1, 4, 3), strict=True):
        labels.append(row.clone())
        labels[-1][:-count] = -100
    return rows, labels


def padded(rows: Sequence[Tensor], labels: Sequence[Tensor], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """A batch."""
    width = max(map(len, rows)) + extra
    batch = {"input_ids": torch.full((len(rows), width), zoo.PAD), "labels": torch.full((len(rows), width), -100)}
    batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, wanted) in enumerate(zip(rows, labels, strict=True)):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch["input_ids"][i, where], batch["labels"][i, where], batch["attention_mask"][i, where] = row, wanted, 1
    return batch
