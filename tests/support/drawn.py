"""Shared by the property tests: cached models, batches padded on either side, labels for every head."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import zoo
from table import PAIRS
from torch import Tensor

BRIEF = [
    (entry, case)
    for entry, case in PAIRS
    if case.head in ("causal", "seq2seq")
    or case.arch in ("bert", "roberta", "llama")
    or (case.arch in zoo.MORE_ENCODERS and entry.name in ("prompt", "prompt-end", "p-tuning-v2"))
]
"""Every method on every architecture, and a choice of the heads."""


@cache
def model_of(case: zoo.Case) -> Any:
    return zoo.build(case.arch, case.head)


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(before: dict[str, Tensor], model: Any) -> bool:
    after = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if not n.startswith("soft_prompt.")}
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def label_of(case: zoo.Case, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    rows = ids.shape[0]
    if case.head in ("causal", "masked", "tokens"):
        labels = ids % 3 if case.head == "tokens" else ids
        return {"labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}
    if case.head == "seq2seq":
        return {"labels": zoo.text(rows, 4, seed=5)}
    if case.head == "qa":
        return {"start_positions": torch.ones(rows, dtype=torch.long), "end_positions": torch.full((rows,), 2)}
    return {"labels": torch.arange(rows) % 3}


def batch_of(case: zoo.Case, rows: list[Tensor], width: int, side: str, pad: int) -> dict[str, Tensor]:
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return zoo.inputs(case, ids, mask)
