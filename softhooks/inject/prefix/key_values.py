"""The keys and values of prompts for every attention layer, either shared by all rows of a batch or different in each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.stack import Site
from softhooks.errors import PromptNotReachedError


@dataclass
class RequestColumns:
    """Which virtual tokens each token sees in a continuous batch whose requests use different prompts, of P tokens in total.

    Attributes:
        tokens: for each token of the text, the index of its request's prompt, or -1 for no prompt, [T].
        owners: for each virtual token, the index of its prompt, [P].
        before: for each virtual token, its distance to the first token of the text, [P].
        windowed: whether sliding windows treat the virtual token as a token directly before the text, [P] bool.
        shift: for each token of the text, the number by which its position is shifted, [1, T].
        longest: the largest number of virtual tokens of a prompt.
        absent: for each layer that only some prompts enter, the virtual tokens of the others, [P] bool by layer index.
    """

    tokens: Tensor
    owners: Tensor
    before: Tensor
    windowed: Tensor
    shift: Tensor
    longest: int
    absent: dict[int, Tensor]

    def visible(self, index: int, window: int | None, positions: Tensor | None, queries: int) -> Tensor:
        """Return the virtual tokens that each of the last Q tokens sees in a layer, [1, 1, Q, P] bool.

        Args:
            index: the index of the layer.
            window: the sliding window of the layer, if it has one.
            positions: the positions of the text in its request, [1, T].
            queries: Q.
        """
        seen = self.tokens[-queries:, None] == self.owners
        if index in self.absent:
            seen = seen & ~self.absent[index]
        if window is not None and positions is not None:
            distance = positions.to(seen.device)[0, -queries:, None] + self.before
            seen = seen & ((distance < window) | ~self.windowed)
        return seen[None, None]


@dataclass
class KeyValues:
    """The keys and values of a prefix in self-attention, or in cross-attention.

    Attributes:
        keys, values: tensors [R, Hk, P, D] by layer index, for each layer with a prefix; R is 1 (shared by every row), the batch
            size B, or the number of the prompt's variants.
        lengths: the number of virtual tokens in each row, [B]; a prefix shorter than P is padded on the left. None if every row
            has P virtual tokens.
        windowed: whether sliding windows treat the prefix as tokens directly before the text; a bool, or [B] bool.
        shifted: whether the text's positions start after the prefix; a bool, or [B] bool.
        states: the virtual tokens' last hidden states, [R, P, H], if the prompt was run through the stack.
        hidden: the virtual tokens that a row must not see, [B or 1, P] bool, or None if each row sees all its virtual tokens.
        missing: for each layer that only some prompts of the batch enter, the rows with another prompt, [B] bool by layer index.
        requests: in a continuous batch whose requests use different prompts, which virtual tokens each token sees; R is then 1.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    lengths: Tensor | None = None
    windowed: bool | Tensor = True
    shifted: bool | Tensor = True
    states: Tensor | None = None
    hidden: Tensor | None = None
    missing: dict[int, Tensor] = field(default_factory=dict)
    requests: RequestColumns | None = None

    @property
    def variants(self) -> int:
        """The number of rows of each tensor (R)."""
        return self.any_key.shape[0]

    @property
    def length(self) -> int:
        """The largest number of virtual tokens in a row (P)."""
        return self.any_key.shape[2]

    @property
    def longest(self) -> int:
        """The largest number of virtual tokens before a sequence; less than P if several prompts precede one row."""
        return self.length if self.requests is None else self.requests.longest

    def differs_at(self, index: int) -> bool:
        """Whether only some of the prompts enter a layer, so that its mask differs from those of other layers."""
        return index in self.missing or (self.requests is not None and index in self.requests.absent)

    @property
    def any_key(self) -> Tensor:
        """The keys of the first layer with a prefix; R and P are the same for all layers."""
        for key in self.keys.values():
            return key
        raise PromptNotReachedError(
            "the prompt has no keys and values, because the model called no attention function that softhooks has wrapped.",
            "Do not replace attention modules or functions while a prompt is attached, or attach with `injection='slots'`.",
        )

    def before(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's prefix before the text's keys and values. [B, Hk, K, D] -> [B, Hk, P + K, D]."""
        batch = key.shape[0]
        prefix_key = self.keys[index].to(key).expand(batch, -1, -1, -1)
        prefix_value = self.values[index].to(value).expand(batch, -1, -1, -1)
        return torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)

    def shift(self) -> int | Tensor:
        """Return the number by which the text's positions are shifted: P or 0, or [B, 1] or [1, T] if rows or requests differ."""
        if self.requests is not None:
            return self.requests.shift
        if isinstance(self.shifted, Tensor) and self.lengths is not None:
            return (self.lengths * self.shifted)[:, None]
        return self.length if self.shifted else 0

    def present(self, device: torch.device, index: int | None = None) -> Tensor | None:
        """Return the virtual tokens that each row has and may see, [B or 1, P] bool, or None for all.

        Args:
            index: the index of a layer; rows without a prefix in this layer see no virtual tokens. If None, `missing` is ignored.
        """
        seen = [] if self.hidden is None else [~self.hidden.to(device)]
        if index in self.missing:
            seen.append(~self.missing[index].to(device)[:, None].expand(-1, self.length))
        if self.lengths is not None:
            columns = torch.arange(self.length, device=device)
            seen.append(columns >= self.length - self.lengths.to(device)[:, None])
        return reduce(torch.logical_and, seen) if seen else None


def split(flat: Tensor, sites: Sequence[Site]) -> KeyValues:
    """Split a matrix, [P, sum over layers of Hk * (Dk + Dv)], in which each layer's keys precede its values.

    Shape:
        -> keys [1, Hk, P, Dk] and values [1, Hk, P, Dv] for each layer
    """
    virtual = flat.shape[0]
    first = sites[0]
    # The backward of `unbind` and `split` is one copy; the backward of indexing fills a full-size tensor for every layer.
    if all((s.heads, s.key_dim, s.value_dim) == (first.heads, first.key_dim, first.key_dim) for s in sites):
        # One copy for all layers instead of a strided view per layer, so that every later `cat` reads contiguous rows.
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
    """Join the keys and values of layers into one matrix; the inverse of `split`."""
    parts = []
    for site in sites:
        parts += [tensor[0].transpose(0, 1).flatten(1) for tensor in (keys[site.index], values[site.index])]
    return torch.cat(parts, dim=-1)


def mix(prompts: Sequence[KeyValues], rows: Sequence[int | None]) -> KeyValues:
    """Combine the prefixes of a batch whose rows use different prompts. [R_i, Hk, P_i, D] each -> [B, Hk, max P_i, D].

    Args:
        prompts: the prefixes; each may be limited to some layers.
        rows: for each row, the index of its variant among the variants of all prompts, or None for a row without a prompt.
    """
    longest = max(prompt.length for prompt in prompts)
    device = prompts[0].any_key.device
    sites = sorted({site for prompt in prompts for site in prompt.keys})
    owners = [prompt for prompt in prompts for _ in range(prompt.variants)]
    lengths = [0 if row is None else owners[row].length for row in rows]
    windowed = [row is not None and bool(owners[row].windowed) for row in rows]
    shifted = [row is not None and bool(owners[row].shifted) for row in rows]
    even = len(set(zip(lengths, windowed, shifted, strict=True))) == 1 and lengths[0] == longest
    index = torch.tensor([len(owners) if row is None else row for row in rows], device=device)

    def gather(given: list[Tensor | None]) -> Tensor:
        like = next(tensor for tensor in given if tensor is not None)  # at least one prompt has the layer
        nothing = like.new_zeros(1, like.shape[1], longest, like.shape[3])
        # Padded on the left, so that every prompt ends next to the text.
        parts = [
            nothing.expand(prompt.variants, -1, -1, -1)
            if tensor is None
            else functional.pad(tensor, (0, 0, longest - tensor.shape[2], 0))
            for prompt, tensor in zip(prompts, given, strict=True)
        ]
        return torch.cat([*parts, nothing]).index_select(0, index)

    def without(site: int) -> list[bool]:
        return [row is not None and site not in owners[row].keys for row in rows]

    return KeyValues(
        keys={site: gather([prompt.keys.get(site) for prompt in prompts]) for site in sites},
        values={site: gather([prompt.values.get(site) for prompt in prompts]) for site in sites},
        lengths=None if even else torch.tensor(lengths, device=device),
        windowed=windowed[0] if even else torch.tensor(windowed, device=device),
        shifted=shifted[0] if even else torch.tensor(shifted, device=device),
        missing={site: torch.tensor(without(site), device=device) for site in sites if any(without(site))},
    )
