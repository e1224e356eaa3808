"""Predictions of a causal language model: the most likely package as the next token, with or without examples in the context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softhooks.compat.cache_argument import CACHE
from softhooks.demo.corpus import Row
from softhooks.demo.language_model.accuracy import accuracy
from softhooks.demo.language_model.task import Task


@dataclass(frozen=True)
class Predictions:
    """The logits of the packages' tokens for some rows, [rows, packages], and the rows' packages, [rows]."""

    logits: npt.NDArray[np.float32]
    references: npt.NDArray[np.int64]

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """The most likely package of each row."""
        classes: npt.NDArray[np.int64] = self.logits.argmax(-1)
        return classes

    @property
    def accuracy(self) -> float:
        """The share of rows with the right package."""
        return accuracy(self.classes, self.references)["accuracy"]

    def first(self, rows: int) -> Predictions:
        """Return the predictions for the first rows."""
        return Predictions(self.logits[:rows], self.references[:rows])

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy, from the number of rows."""
        return standard_error(self.accuracy, len(self.references))


def standard_error(accuracy: float, rows: int) -> float:
    """Return the standard error of an accuracy on this many rows."""
    return float(np.sqrt(accuracy * (1 - accuracy) / rows))


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, [B, T] each, of rows that are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    context: Sequence[int] = (),
    *,
    batch_size: int = 16,
    description: str,
) -> Predictions:
    """Return the logits of the packages' tokens after each row's question.

    Args:
        context: ids before every row, such as examples. Their keys and values are computed once.
        description: the text before the progress bar.
    """
    model.eval()
    pad = task.tokenizer.pad_token_id
    context = task.start_ids(context)
    cache = None
    if context:
        cache = model(torch.tensor([context], device=model.device), use_cache=True)[CACHE]
    logits = []
    for start in track(range(0, len(rows), batch_size), description, transient=True):
        batch = rows[start : start + batch_size]
        ids, mask = (part.to(model.device) for part in left_padded([task.question_ids(row) for row in batch], pad))
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if cache is not None:
            call |= follow_context(cache, mask, len(context))
        logits.append(model(**call, logits_to_keep=1).logits[:, -1, list(task.label_ids)].float().cpu())
    return Predictions(torch.cat(logits).numpy(), np.array([task.label_of(row) for row in rows]))


def follow_context(cache: DynamicCache, mask: Tensor, length: int) -> dict[str, Any]:
    """Return the arguments for rows that follow a cached context: its copy for each row, the whole mask, and the positions."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(len(mask))
    whole = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
    positions = (whole.cumsum(1) - 1)[:, length:]
    return {CACHE: copied, "attention_mask": whole, "position_ids": positions}


@torch.no_grad()
def generate(
    model: PreTrainedModel, task: Task, row: Row, context: Sequence[int] = (), max_new_tokens: int = 12
) -> str:
    """Return the text that the model generates after a row's question, up to its end or `max_new_tokens`.

    Args:
        context: ids before the row, such as the instruction.
    """
    model.eval()
    ids = torch.tensor([[*task.start_ids(context), *task.question_ids(row)]], device=model.device)
    decoder: Any = model  # its type has no `generate`
    output = decoder.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=task.tokenizer.pad_token_id
    )
    [text] = task.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
