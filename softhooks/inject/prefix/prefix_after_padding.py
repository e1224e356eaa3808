"""Put a prefix between the left padding of a row and its text, for layers whose biases and windows count columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softhooks.inject.gather_columns import gather_columns


@dataclass(frozen=True)
class KeyOrder:
    """The order of keys in rows that start with padding: the padding, the prefix, the text.

    Attributes:
        order: for each place, the column of the concatenated prefix and text that goes there, [B, P + K].
        text: the place of each column of the text, [B, K].
    """

    order: Tensor
    text: Tensor

    def arrange(self, tensor: Tensor, dim: int) -> Tensor:
        """Put columns of prefix and text in order. [B, ..., P + K, ...] -> the same shape."""
        return gather_columns(tensor, self.order, dim)

    def own(self, tensor: Tensor) -> Tensor:
        """Select the text's columns of the last dimension. [B * n, ..., P + K] -> [B * n, ..., K]."""
        batch = self.text.shape[0]
        if tensor.shape[0] % batch:
            tensor = tensor.expand(batch, *tensor.shape[1:])
        rows = tensor.reshape(batch, -1, tensor.shape[-1])
        return gather_columns(rows, self.text, 2).reshape(*tensor.shape[:-1], -1)


def key_order(mask: Tensor | None, length: int) -> KeyOrder | None:
    """Return the order of a text's keys with a prefix of `length`, or None if no row starts with padding.

    Args:
        mask: the text's mask, [B, K].
    """
    if mask is None or mask.dim() != 2 or bool(mask[:, 0].all()):
        return None
    lead = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    places = torch.arange(length + mask.shape[1], device=mask.device)[None]
    # Place p holds padding (column p + P) for p < lead, then the prefix (column p - lead), then the text (column p).
    prefix = torch.where(places < lead + length, places - lead, places)
    columns = torch.arange(mask.shape[1], device=mask.device)[None]
    return KeyOrder(
        order=torch.where(places < lead, places + length, prefix),
        text=torch.where(columns < lead, columns, columns + length),
    )
