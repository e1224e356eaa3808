"""Gated branches: each query also attends to the prompt with a separate softmax, and a gate scales the result.

`output = attention(q, k, v) + gate * softmax(q kP^T) vP` is computed before the output projection. With gates of 0 the output
equals the base model's output bit for bit. Attention over the text runs unchanged, with its masks, caches, windows and kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.stack import Site, Stack
from softhooks.compat.sharding import is_sharded
from softhooks.inject.branch.linear_scaling import Scaled, scale, scale_tokens
from softhooks.inject.branch.projections import keys_and_values
from softhooks.inject.checkpointing import CheckpointedPass

CONTEXT = "prompt_context"
"""The extra argument of the forward with a context for each row of the batch, such as image features."""


@dataclass
class GatedRows:
    """A prompt's virtual tokens and gates at one attention layer.

    Attributes:
        rows: the virtual tokens, [K, H], or [B, K, H] if they differ between the rows of the batch.
        gate: the gate of each query head, [Hq].
    """

    site: Site
    rows: Tensor
    gate: Tensor


@dataclass
class BranchInputs:
    """A prompt's virtual tokens and gates for one stack, and the factors and offsets of linear layers, [1, out] each."""

    gated: list[GatedRows]
    scaled: Scaled = field(default_factory=dict)


@dataclass
class Branch:
    """A prompt's keys and values at the attention layers of a stack, by layer index.

    Attributes:
        keys, values: [R, Hq, K, D]; R is 1 (shared by every row) or B. The values are already multiplied by the gates.
        pending: layers with sharded weights. Their keys and values are computed in the layer's forward, after FSDP2 has gathered
            the weights.
        seen: the virtual tokens that each row attends to, [B, 1, 1, K] bool, at layers where their number differs between rows;
            or those that each token attends to, [1, 1, T, K].
        scaled: the factors and offsets of linear layers, [R, out] each, or [T, out] if they differ between tokens.
        by_token: whether the tokens of one row use different prompts, as in a continuous batch.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    pending: dict[int, GatedRows] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)
    scaled: Scaled = field(default_factory=dict)
    by_token: bool = False


def branch_of(given: BranchInputs) -> Branch:
    """Compute the keys and gated values of a prompt for every layer whose weights are not sharded."""
    branch = Branch({}, {}, scaled=given.scaled)
    for gated in given.gated:
        index = gated.site.index
        if any(map(is_sharded, gated.site.module.parameters())):
            branch.pending[index] = gated
        else:
            branch.keys[index], branch.values[index] = _keys_and_gated_values(gated, given.scaled)
    return branch


def _keys_and_gated_values(gated: GatedRows, scaled: Scaled) -> tuple[Tensor, Tensor]:
    """Compute the keys and gated values at one layer, [R, Hq, K, D] each."""
    site, rows = gated.site, gated.rows if gated.rows.dim() == 3 else gated.rows[None]
    repeats = gated.gate.shape[0] // site.heads
    both = [part.unflatten(0, rows.shape[:2]) for part in keys_and_values(site, rows.flatten(0, 1), scaled)]
    both = [part.transpose(1, 2) for part in both]
    key, value = (part.repeat_interleave(repeats, dim=1) if repeats > 1 else part for part in both)
    return key, (value * gated.gate.to(value.device)[:, None, None]).to(value.dtype)


class BranchPass(CheckpointedPass):
    """A forward with a gated branch at each layer that has virtual tokens.

    Args:
        training: whether layers may be checkpointed in this forward.

    Attributes:
        blank: True where the text is padding, [B, T] bool, or None if no row starts with padding.
    """

    def __init__(self, stack: Stack, branch: Branch, training: bool = False) -> None:
        super().__init__(stack)
        self.branch = branch
        self.blank: Tensor | None = None
        self.has_injected = not branch.keys and not branch.pending
        if training:
            self.follow_checkpointing()

    def enters(self, site: Site) -> bool:
        """Whether a layer has virtual tokens."""
        return site.role == "self" and (site.index in self.branch.keys or site.index in self.branch.pending)

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function over the text, and add the attention over the prompt to its output, [B, T, Hq, D]."""
        output, weights = attention(*args, **kwargs)
        if not self.enters(site):
            return output, weights
        self.has_injected = True
        return output + self._added(site.index, args[1], kwargs).to(output), weights

    def _added(self, index: int, query: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attend to the prompt. [B, Hq, T, D] -> [B, T, Hq, Dv]."""
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        if query.dtype == torch.float16:  # in which unscaled scores (GPT-Neo) overflow
            query = query.float()
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        pending = self.branch.pending.get(index)
        if pending is None:
            keys, values = self.branch.keys[index], self.branch.values[index]
        else:
            keys, values = _keys_and_gated_values(pending, self.branch.scaled)
        scores = query @ (keys.to(query) * scaling).transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = self.branch.seen.get(index)
        if seen is not None:
            scores = scores.masked_fill(~seen.to(scores.device), torch.finfo(scores.dtype).min)
        values = values.to(query)
        # The softmax is in float32, as in the models' own attention.
        precise = torch.promote_types(scores.dtype, torch.float32)
        added: Tensor = scores.softmax(-1, dtype=precise).to(values.dtype) @ values
        return added.transpose(1, 2)

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Multiply the output of a linear layer by its factor, and add its offset."""
        if self.branch.by_token:
            return scale_tokens(self.branch.scaled, name, output)
        return scale(self.branch.scaled, name, output, self.blank)

    def injected_tensors(self) -> list[Tensor]:
        """Return every key, value, factor and offset."""
        scaled = [part for both in self.branch.scaled.values() for part in both]
        return [*self.branch.keys.values(), *self.branch.values.values(), *scaled]

    def detach_injected(self) -> None:
        """Replace every injected tensor with a leaf of the autograd graph."""
        branch = self.branch
        self.branch = Branch(
            keys={index: self.leaf_of(tensor) for index, tensor in branch.keys.items()},
            values={index: self.leaf_of(tensor) for index, tensor in branch.values.items()},
            pending={
                index: GatedRows(gated.site, self.leaf_of(gated.rows), self.leaf_of(gated.gate))
                for index, gated in branch.pending.items()
            },
            seen=branch.seen,
            scaled={name: (self.leaf_of(a), self.leaf_of(b)) for name, (a, b) in branch.scaled.items()},
            by_token=branch.by_token,
        )


def mix_branches(branches: Sequence[Branch], rows: Sequence[Sequence[int]], batch: int) -> Branch:
    """Combine the branches of a batch whose rows use different prompts.

    The values are 0 for a row without a prompt, and at a layer where the row's prompt has no virtual tokens.

    Args:
        branches: the branch of each prompt; R_i is 1 or the number of batch rows with the prompt.
        rows: the indices of the batch rows that use each prompt.

    Shape:
        keys and values [R_i, Hq, K_i, D] -> [B, Hq, max K_i, D]
    """
    mixed = Branch({}, {})
    pairs = list(zip(branches, rows, strict=True))
    for index in sorted({index for branch in branches for index in branch.keys}):
        own = [(branch, where) for branch, where in pairs if index in branch.keys]
        longest = max(branch.keys[index].shape[2] for branch, _ in own)
        where = [where for _, where in own]
        mixed.keys[index] = _spread([_pad(branch.keys[index], longest) for branch, _ in own], where, batch)
        mixed.values[index] = _spread([_pad(branch.values[index], longest) for branch, _ in own], where, batch)
        lengths = [longest] * batch
        for branch, places in own:
            for row in places:
                lengths[row] = branch.keys[index].shape[2]
        if min(lengths) < longest:
            device = mixed.keys[index].device
            columns = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
            mixed.seen[index] = columns[:, None, None, :]
    for name in dict.fromkeys(name for branch in branches for name in branch.scaled):
        own = [(branch, where) for branch, where in pairs if name in branch.scaled]
        where = [where for _, where in own]
        factor, offset = (_spread([branch.scaled[name][i] for branch, _ in own], where, batch) for i in (0, 1))
        without = torch.ones(batch, 1, device=factor.device)  # a factor of 1 for rows whose prompt has none
        without[[row for places in where for row in places]] = 0.0
        mixed.scaled[name] = factor + without, offset
    return mixed


def _pad(tensor: Tensor, length: int) -> Tensor:
    return functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))


def _spread(tensors: Sequence[Tensor], rows: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Copy each tensor to its n rows of the batch; rows without a tensor get zeros. [1 or n, ...] each -> [B, ...]."""
    count = sum(tensor.shape[0] for tensor in tensors)
    source, first = [count] * batch, 0
    for tensor, places in zip(tensors, rows, strict=True):
        for number, row in enumerate(places):
            source[row] = first + (number if tensor.shape[0] > 1 else 0)
        first += tensor.shape[0]
    index = torch.tensor(source, device=tensors[0].device)
    return torch.cat([*tensors, torch.zeros_like(tensors[0][:1])]).index_select(0, index)
