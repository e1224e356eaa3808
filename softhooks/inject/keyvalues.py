"""The keys and values of a prompt, as attention takes them: one row shared by all, or one a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.anatomy import Site


@dataclass
class KeyValues:
    """Keys and values for every site of one role.

    Attributes:
        keys, values: [R, Hk, P, D] for each site index; R is 1 (shared by every row) or B.
        lengths: how many of the P virtual tokens each row has, [B]; they stand rightmost, next to the text. None: all have P.
        windowed: whether sliding layers see the prefix as tokens at the positions before the text; a bool, or [B] bool.
        shifted: whether the text's positions start behind the prefix; a bool, or [B] bool.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    lengths: Tensor | None = None
    windowed: bool | Tensor = True
    shifted: bool | Tensor = True

    @property
    def length(self) -> int:
        """P, the longest row's virtual tokens."""
        return next(iter(self.keys.values())).shape[2]

    def before(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a site's prefix before the text's keys and values. [B, Hk, K, D] -> [B, Hk, P + K, D]."""
        batch = key.shape[0]
        prefix_key = self.keys[index].to(key).expand(batch, -1, -1, -1)
        prefix_value = self.values[index].to(value).expand(batch, -1, -1, -1)
        return torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)

    def shift(self) -> int | Tensor:
        """How far the text's positions move: P or 0, or [B, 1] where rows differ."""
        if isinstance(self.shifted, Tensor) and self.lengths is not None:
            return (self.lengths * self.shifted)[:, None]
        return self.length if self.shifted else 0

    def present(self, device: torch.device) -> Tensor | None:
        """Which virtual tokens each row has, [B, P] bool; None: all."""
        if self.lengths is None:
            return None
        columns = torch.arange(self.length, device=device)
        return columns >= self.length - self.lengths.to(device)[:, None]


def split(flat: Tensor, sites: Sequence[Site]) -> KeyValues:
    """Cut the flat form of a prefix into the keys and values of its sites.

    Shape:
        [P, sum over sites of Hk * (Dk + Dv)] -> keys [1, Hk, P, Dk], values [1, Hk, P, Dv] each; keys come first.
    """
    virtual = flat.shape[0]
    first = sites[0]
    # Cut with `unbind` and `split`, whose backward is one copy; that of indexing fills a full-size tensor for every layer.
    if all((s.heads, s.key_dim, s.value_dim) == (first.heads, first.key_dim, first.key_dim) for s in sites):
        # One copy for all layers instead of one view a layer: every later `cat` then reads contiguous rows.
        stacked = flat.view(virtual, 2 * len(sites), first.heads, first.key_dim).permute(1, 2, 0, 3).contiguous()
        parts = stacked.unsqueeze(1).unbind(0)
    else:
        shapes = [(site.heads, dim) for site in sites for dim in (site.key_dim, site.value_dim)]
        columns = flat.split_with_sizes([heads * dim for heads, dim in shapes], dim=1)
        parts = tuple(
            column.view(virtual, *shape).transpose(0, 1).unsqueeze(0)
            for column, shape in zip(columns, shapes, strict=True)
        )
    return KeyValues(
        keys={site.index: key for site, key in zip(sites, parts[0::2], strict=True)},
        values={site.index: value for site, value in zip(sites, parts[1::2], strict=True)},
    )


def flatten(keys: dict[int, Tensor], values: dict[int, Tensor], sites: Sequence[Site]) -> Tensor:
    """The inverse of `split`: [1, Hk, P, D] for each site -> [P, numbers]."""
    parts = []
    for site in sites:
        parts += [tensor[0].transpose(0, 1).flatten(1) for tensor in (keys[site.index], values[site.index])]
    return torch.cat(parts, dim=-1)


def mix(prompts: Sequence[KeyValues], rows: Sequence[int | None]) -> KeyValues:
    """Give each row of a batch its own prompt; None gives a row no prompt.

    Args:
        prompts: the prompts in use.
        rows: for each row, which of them.

    Shape:
        prompts [1, Hk, P_i, D] -> [B, Hk, max P_i, D]
    """
    longest = max(prompt.length for prompt in prompts)
    like = prompts[0]
    device = next(iter(like.keys.values())).device
    lengths = [0 if row is None else prompts[row].length for row in rows]
    windowed = [row is not None and bool(prompts[row].windowed) for row in rows]
    shifted = [row is not None and bool(prompts[row].shifted) for row in rows]
    even = len(set(zip(lengths, windowed, shifted, strict=True))) == 1 and lengths[0] == longest
    index = torch.tensor([len(prompts) if row is None else row for row in rows], device=device)

    def gather(tensors: list[Tensor]) -> Tensor:
        padded = [functional.pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in tensors]
        return torch.cat([*padded, torch.zeros_like(padded[0])]).index_select(0, index)

    return KeyValues(
        keys={site: gather([prompt.keys[site] for prompt in prompts]) for site in like.keys},
        values={site: gather([prompt.values[site] for prompt in prompts]) for site in like.values},
        lengths=None if even else torch.tensor(lengths, device=device),
        windowed=windowed[0] if even else torch.tensor(windowed, device=device),
        shifted=shifted[0] if even else torch.tensor(shifted, device=device),
    )
