"""The prefixes of a continuous batch whose requests use different prompts.

All requests share one row, so the prefixes of the prompts follow one another before the row, and the mask lets each token of the
text see only the prefix of its own request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softhooks.inject.prefix.key_values import KeyValues, RequestColumns


def join_prefixes(prompts: Sequence[KeyValues], rows: Sequence[int | None], lengths: Sequence[int]) -> KeyValues:
    """Put the prefixes of several prompts one after another. [1, Hk, P_i, D] each -> [1, Hk, sum of P_i, D].

    Args:
        prompts: the prefixes; each may be limited to some layers.
        rows: for each request, the index of its prompt, or None for a request without a prompt.
        lengths: the number of the request's tokens in this forward.
    """
    device = prompts[0].any_key.device
    sizes = [prompt.length for prompt in prompts]
    joined = KeyValues({}, {})
    absent: dict[int, Tensor] = {}
    for site in sorted({site for prompt in prompts for site in prompt.keys}):
        has = [site in prompt.keys for prompt in prompts]
        joined.keys[site] = _join([prompt.keys.get(site) for prompt in prompts], sizes)
        joined.values[site] = _join([prompt.values.get(site) for prompt in prompts], sizes)
        if not all(has):
            absent[site] = _by_column([not own for own in has], sizes, device)
    shifts = [prompt.length if prompt.shifted else 0 for prompt in prompts]
    chosen = [-1 if row is None else row for row in rows]
    joined.requests = RequestColumns(
        tokens=_by_column(chosen, lengths, device),
        owners=_by_column(range(len(prompts)), sizes, device),
        before=torch.cat([torch.arange(size, 0, -1, device=device) for size in sizes]),
        windowed=_by_column([bool(prompt.windowed) for prompt in prompts], sizes, device),
        shift=_by_column([0 if row < 0 else shifts[row] for row in chosen], lengths, device)[None],
        longest=max(sizes),
        absent=absent,
    )
    return joined


def _by_column(values: Sequence[int | bool], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Repeat each value as often as its size says. -> [sum of sizes]."""
    return torch.tensor([one for one, size in zip(values, sizes, strict=True) for _ in range(size)], device=device)


def _join(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Concatenate the prefixes of one layer; a prompt without a prefix in this layer gets zeros, which the mask hides."""
    like = next(part for part in parts if part is not None)
    filled = [
        like.new_zeros(1, like.shape[1], size, like.shape[3]) if part is None else part.to(like)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(filled, dim=2)
