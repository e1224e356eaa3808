"""Flash attention's contract, emulated on the CPU: a 2D mask or none, causal from the lower right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "emulated"


def flash_emulated_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    assert mask is None or mask.dim() == 2
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    causal = getattr(module, "is_causal", True)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = seen.tril(keys - queries) if causal else seen
    if sliding_window:
        seen = seen.triu(keys - queries - sliding_window + 1)
        seen = seen if causal else seen.tril(keys - queries + sliding_window - 1)
    seen = seen[None, None] if mask is None else seen[None, None] & mask[:, None, None, :].bool()
    seen = seen | ~seen.any(-1, keepdim=True)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None
