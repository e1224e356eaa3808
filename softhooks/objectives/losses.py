"""Functions that objectives share: the KL divergence between logits, and sums over each sequence of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.packed_documents import document_numbers


def kl_divergence(teacher: Tensor, student: Tensor, top_k: int | None = None) -> Tensor:
    """Compute KL(teacher || student) from logits, in fp32; exactly 0 where they are equal. [..., V], [..., V] -> [...].

    With `top_k`, all tokens except the teacher's k most likely ones count as one token. This never increases the result.
    """
    target, predicted = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if top_k is not None and top_k < target.shape[-1]:
        top = target.topk(top_k, dim=-1).indices
        target, predicted = _merge_others(target, top), _merge_others(predicted, top)
    return (target.exp() * (target - predicted)).sum(-1)


def _merge_others(log_probs: Tensor, top: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens in `top` and of all others combined. [..., V], [..., k] -> [..., k + 1]."""
    others = log_probs.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, top), others], dim=-1)


def require_logits(logits: Tensor, rows: int, columns: int) -> None:
    """Check that a model returned logits for every token."""
    if logits.shape[:2] != (rows, columns):
        raise UnsupportedModeError(
            f"the first two dimensions of the logits are {list(logits.shape[:2])}, but the labels have the shape "
            f"{[rows, columns]}; the loss needs logits for all tokens.",
            "Do not pass `logits_to_keep` during training.",
        )


@dataclass(frozen=True)
class Texts:
    """The sequence that each token of a batch belongs to: a whole row, or one of several documents packed into a row.

    Attributes:
        columns: the index of each token's sequence within its row, [B, T].
        per_row: the largest number of sequences in a row; rows with fewer sequences are padded with empty ones.
    """

    columns: Tensor
    per_row: int

    @classmethod
    def of(cls, call: dict[str, Any], like: Tensor) -> Texts:
        """Find the sequences from the position ids, which restart at each packed document.

        Args:
            call: the arguments of the model's forward by name.
            like: any tensor of shape [B, T].
        """
        found = document_numbers(call.get("position_ids"), call.get("attention_mask"), like.shape[1])
        if found is None:
            return cls(torch.zeros_like(like, dtype=torch.long), 1)
        return cls(found.to(like.device).expand(like.shape), int(found.max()) + 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each sequence, deterministically on every device. [B, T] -> [B * per_row]."""
        if self.per_row == 1:
            return values.sum(-1)
        own = functional.one_hot(self.columns.to(values.device), self.per_row).bool()
        return values[..., None].masked_fill(~own, 0).sum(1).flatten()
