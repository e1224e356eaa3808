"""A long prefix and few, short rows: attention over the prefix and all rows in one sequence, each row blind to the others.

A copy of the prefix's keys and values for every row costs memory in proportion to rows times prefix. Joined, they are there once.
The scores of rows that do not see each other are computed for nothing, so this pays only where the prefix is at least as long as
all rows together.
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
    """Whether rows can be joined, and whether it pays: in training, behind one long prefix that they share."""
    batch, _, columns, _ = query.shape
    shared = prefix.variants == 1 and prefix.lengths is None and kwargs.get("position_bias") is None
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1)
    if not (shared and plain and function == "sdpa_attention_forward" and torch.is_grad_enabled()):
        return False
    return (
        batch > 1 and batch * columns <= prefix.length and key.shape[2] == columns and not torch.compiler.is_compiling()
    )


def joint_mask(mask: Tensor | None, visible: Tensor | None, prefix: KeyValues, query: Tensor, causal: bool) -> Tensor:
    """Which keys each query of the joined rows sees.

    Args:
        mask: [B, 1, T, T], bool (True: seen) or additive; None: every text token, or with `causal` those up to its own.
        visible: which virtual tokens each query sees, [B or 1, 1, T or 1, P] bool; None: all.

    Shape:
        -> [1, 1, B * T, P + B * T], of the mask's kind.
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
    blocks = joined[..., length:].unflatten(-1, (batch, columns))
    each = torch.arange(batch, device=device)
    blocks[each, :, each] = mask[:, 0].expand(batch, -1, -1)
    return joined.flatten(0, 1)[None, None]


def attend_jointly(
    attention: Callable[..., Any], prefix: KeyValues, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an attention function over joined rows, and cut its output into rows again.

    Args:
        index: the site's.
        args: module, query [B, Hq, T, D], key and value [B, Hk, T, D], joined mask, and what else there is.
    """
    module, query, key, value, mask, *rest = args
    batch = query.shape[0]
    key = torch.cat([prefix.keys[index].to(key), _joined(key)], dim=2)
    value = torch.cat([prefix.values[index].to(value), _joined(value)], dim=2)
    output, _ = attention(module, _joined(query), key, value, mask, *rest, **kwargs)
    return output.unflatten(1, (batch, -1)).squeeze(0), None


def _joined(rows: Tensor) -> Tensor:
    """Put rows behind each other. [B, H, T, D] -> [1, H, B * T, D]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]
