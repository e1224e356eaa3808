"""The gated branches of a continuous batch whose requests use different prompts.

All requests share one row, so the virtual tokens of the prompts follow one another, and each token of the text sees those of its
own request. A last virtual token with the value 0 is seen by tokens without any other virtual token: nothing is added to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.inject.branch.branch import Branch


def join_branches(branches: Sequence[Branch], rows: Sequence[int | None], lengths: Sequence[int]) -> Branch:
    """Join the branches of several prompts. [1, Hq, K_i, D] each -> [1, Hq, 1 + sum of K_i, D].

    Args:
        branches: the branch of each prompt, shared by all rows.
        rows: for each request, the index of its prompt, or None for a request without a prompt.
        lengths: the number of the request's tokens in this forward.
    """
    joined = Branch({}, {})
    chosen = torch.tensor([-1 if row is None else row for row in rows])
    tokens = chosen.repeat_interleave(torch.tensor(lengths))
    for index in sorted({index for branch in branches for index in branch.keys}):
        own = [(number, branch) for number, branch in enumerate(branches) if index in branch.keys]
        joined.keys[index] = _join([branch.keys[index] for _, branch in own])
        joined.values[index] = _join([branch.values[index] for _, branch in own])
        owners = torch.tensor([number for number, branch in own for _ in range(branch.keys[index].shape[2])])
        seen = tokens[:, None] == owners
        seen = torch.cat([seen, ~seen.any(-1, keepdim=True)], dim=-1)
        joined.seen[index] = seen[None, None].to(joined.keys[index].device)
    for name in dict.fromkeys(name for branch in branches for name in branch.scaled):
        both = [branch.scaled.get(name) for branch in branches]
        like = next(pair for pair in both if pair is not None)
        # the last entry, which -1 selects, is for tokens without a prompt
        factors = [torch.ones_like(like[0]) if pair is None else pair[0].to(like[0]) for pair in (*both, None)]
        offsets = [torch.zeros_like(like[1]) if pair is None else pair[1].to(like[1]) for pair in (*both, None)]
        where = tokens.to(like[0].device)
        joined.scaled[name] = torch.cat(factors)[where], torch.cat(offsets)[where]
    joined.by_token = True
    return joined


def _join(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    return functional.pad(torch.cat([part.to(first) for part in parts], dim=2), (0, 0, 0, 1))
