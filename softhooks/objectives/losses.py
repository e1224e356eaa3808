"""Loss functions that objectives share: KL divergence of logits, and sums for each text of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.packed_documents import document_numbers


def kl_divergence(teacher: Tensor, student: Tensor, top_k: int | None = None) -> Tensor:
    """Compute KL(teacher || student) for each pair of distributions, in fp32.

    Args:
        teacher, student: logits.
        top_k: keep only the teacher's k most likely tokens, and add up all others as one token; None keeps every token.

    Shape:
        [..., V], [..., V] -> [...]; exactly 0 where the logits are equal, and never above the full KL with `top_k`.
    """
    target, predicted = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if top_k is not None and top_k < target.shape[-1]:
        top = target.topk(top_k, dim=-1).indices
        target, predicted = _merge_others(target, top), _merge_others(predicted, top)
    return (target.exp() * (target - predicted)).sum(-1)


def _merge_others(log_probs: Tensor, top: Tensor) -> Tensor:
    """Keep some log-probabilities, append the log of the total probability of all others. [..., V], [..., k] -> [..., k + 1]."""
    others = log_probs.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, top), others], dim=-1)


def require_logits(logits: Tensor, rows: int, columns: int) -> None:
    """Check that a model returned logits for every row and column of the labels."""
    if logits.shape[:2] != (rows, columns):
        raise UnsupportedModeError(
            f"the model returned logits for {list(logits.shape[:2])} tokens, and the labels are {[rows, columns]}; the loss "
            "needs all logits.",
            "Leave `logits_to_keep` out in training.",
        )


@dataclass(frozen=True)
class Texts:
    """The text of each column of a batch: one text per row, or several documents packed into a row.

    Attributes:
        columns: the number of each column's text within its row, [B, T].
        per_row: how many texts a row has; some may be empty.
    """

    columns: Tensor
    per_row: int

    @classmethod
    def of(cls, call: dict[str, Any], like: Tensor) -> Texts:
        """Find the texts of a call from its positions, which start again with each packed document.

        Args:
            call: the arguments of the model's forward by name.
            like: a tensor with the batch's rows and columns, [B, T].
        """
        found = document_numbers(call.get("position_ids"), call.get("attention_mask"), like.shape[1])
        if found is None:
            return cls(torch.zeros_like(like, dtype=torch.long), 1)
        return cls(found.to(like.device).expand(like.shape), int(found.max()) + 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum the columns of each text, deterministically on every device. [B, T] -> [B * per_row]."""
        if self.per_row == 1:
            return values.sum(-1)
        own = functional.one_hot(self.columns.to(values.device), self.per_row).bool()
        return values[..., None].masked_fill(~own, 0).sum(1).flatten()
