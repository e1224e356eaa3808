"""Join the rows of a batch into one sequence after a long prefix, with a mask that keeps the rows apart.

This is for calls that `merged_attention.py` does not support, such as those on a GPU.

In a batch, the prefix's keys and values are copied for every row. In one sequence there is a single copy, but attention scores
between different rows are computed although they are masked. So rows are joined only if the prefix is at least as long as all
rows together. The effect was measured with 900 virtual tokens. With 8 rows of 64 tokens and grouped-query attention, a training
step takes the same time and its peak memory is 45% lower; without grouped-query attention, a step is 5% slower and takes 15%
more memory. With 4 rows of 32 tokens, a step is 13 to 15% faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softhooks.inject.prefix.key_values import KeyValues


def joining_pays(
    function: str, prefix: KeyValues, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> bool:
    """Whether to join the rows; requires gradients, one long prefix for all rows, and an attention call that allows joining."""
    batch, _, columns, _ = query.shape
    shared = prefix.variants == 1 and prefix.lengths is None and kwargs.get("position_bias") is None
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1)
    if not (shared and plain and function == "sdpa_attention_forward" and torch.is_grad_enabled()):
        return False
    return (
        batch > 1 and batch * columns <= prefix.length and key.shape[2] == columns and not torch.compiler.is_compiling()
    )


def joint_mask(mask: Tensor | None, visible: Tensor | None, prefix: KeyValues, query: Tensor, causal: bool) -> Tensor:
    """Make the mask of the joined rows, [1, 1, B * T, P + B * T], bool or additive like `mask`.

    Args:
        mask: [B, 1, T, T], bool (True: seen) or additive; None if each query sees its whole row (up to itself if `causal`).
        visible: the virtual tokens that each query sees, [B or 1, 1, T or 1, P] bool, or None for all.
    """
    batch, _, columns, _ = query.shape
    length, device = prefix.length, query.device
    if mask is None:
        mask = torch.ones(1, 1, columns, columns, dtype=torch.bool, device=device)
        mask = mask.tril() if causal else mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    joined = mask.new_full((batch, columns, length + batch * columns), hidden)
    joined[..., :length] = 1 if mask.dtype == torch.bool else 0
    if visible is not None:
        joined[..., :length].masked_fill_(~visible[:, 0].expand(batch, columns, -1), hidden)
    # Each block (row, row) on the diagonal is the mask of that row; all other blocks stay hidden.
    blocks = joined[..., length:].unflatten(-1, (batch, columns))
    each = torch.arange(batch, device=device)
    blocks[each, :, each] = mask[:, 0].expand(batch, -1, -1)
    return joined.flatten(0, 1)[None, None]


def attend_jointly(
    attention: Callable[..., Any], prefix: KeyValues, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an attention function over joined rows, and split its output into rows again.

    Args:
        index: the index of the attention layer.
        args: module, query [B, Hq, T, D], key and value [B, Hk, T, D], joint mask, and any further arguments.
    """
    module, query, key, value, mask, *rest = args
    batch = query.shape[0]
    key = torch.cat([prefix.keys[index].to(key), _joined(key)], dim=2)
    value = torch.cat([prefix.values[index].to(value), _joined(value)], dim=2)
    output, _ = attention(module, _joined(query), key, value, mask, *rest, **kwargs)
    return output.unflatten(1, (batch, -1)).squeeze(0), None


def _joined(rows: Tensor) -> Tensor:
    """Concatenate rows. [B, H, T, D] -> [1, H, B * T, D]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]
