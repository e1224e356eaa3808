"""Select columns of a tensor for each row."""

from __future__ import annotations

from torch import Tensor


def gather_columns(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select the given columns of each row along one dimension.

    Shape:
        tensor [B, ..., N, ...], index [B, C] -> [B, ..., C, ...]
    """
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = index.shape
    target = list(tensor.shape)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.to(tensor.device).view(shape).expand(target))
