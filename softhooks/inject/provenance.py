"""Record the prompts that a cache or an encoder's output was computed with, and the state of each prompt.

A name does not identify the state of a prompt: a training step, an assignment to `.data` or folding changes the state, and
another prompt can get the same name. So checksums of the tensors are compared; copies would take as much memory as the prompt.
"""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_tensor
from softhooks.base_model.frozen_record import Digest, digest
from softhooks.inject.reuse import scope_of

_FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64)
"""Odd 64-bit constants, as signed integers; `device_checksum` computes the weight of each position from them."""
_WORDS = 1 << 20
_PLAIN = (bool, int, float, str, type(None))
_tokens: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def token_of(model: nn.Module) -> str:
    """Return an id for a model object, unique across processes."""
    return _tokens.setdefault(model, uuid.uuid4().hex)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a prompt at one moment.

    Attributes:
        checksums: a checksum of each of the prompt's tensors.
        facts: the injection, the assumptions about the forward pass that are saved with the prompt (`SoftPrompt.conventions`),
            and the plain attributes and hooks of the prompt's modules.
    """

    checksums: list[Digest | Tensor]
    facts: tuple[Any, ...]

    def __deepcopy__(self, _memo: object) -> Snapshot:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def equals(self, other: Snapshot) -> bool:
        """Whether another snapshot has the same state."""
        if self.facts != other.facts or len(self.checksums) != len(other.checksums):
            return False
        return all(map(_same, self.checksums, other.checksums))


def snapshot(
    model: nn.Module, encoder: nn.Module, added: nn.Module | None, injection: str, conventions: dict[str, Any]
) -> Snapshot:
    """Take a snapshot of a prompt.

    Inside a `generate` call, in which nothing is trained, the last snapshot is returned if the address and version of each
    tensor are unchanged.

    Args:
        added: the embeddings of added tokens that the prompt trains, if any.
    """
    tensors = [*every_tensor(encoder), *(added.parameters() if added else ())]
    scope = scope_of(model)
    place = None
    if scope is not None and not scope.is_explicit and not any(tensor.is_inference() for tensor in tensors):
        place = [injection, *[(t.data_ptr(), t._version) for t in tensors]]
        known = scope.snapshots.get(id(encoder))
        if known is not None and known[0] == place:
            found: Snapshot = known[1]
            return found
    facts = injection, repr(sorted(conventions.items())), _facts(encoder)
    taken = Snapshot([_checksum(tensor.detach()) for tensor in tensors], facts)
    if scope is not None and place is not None:
        scope.snapshots[id(encoder)] = place, taken
    return taken


def _checksum(tensor: Tensor) -> Digest | Tensor:
    """Hash a tensor in host memory; on a device, or in `torch.func.grad`, compute a checksum without synchronizing."""
    if hasattr(tensor, "to_local"):  # of a sharded tensor (DTensor), only the shard of this process is compared
        tensor = tensor.to_local()
    is_plain = tensor.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return digest(tensor) if is_plain else device_checksum(tensor)


def device_checksum(tensor: Tensor) -> Tensor:
    """Compute a checksum of a tensor's bits on its device: two sums of products with pseudorandom numbers, modulo 2**64, [2]."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32)
    sums = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in _FACTORS]
    for start in range(0, len(words), _WORDS):  # in parts, because 64-bit products take four times the memory
        part = words[start : start + _WORDS].long()
        place = torch.arange(start + 1, start + len(part) + 1, device=tensor.device)
        factors = [place * factor for factor in _FACTORS]
        sums = [
            total + (part * ((mixed ^ (mixed >> 29)) | 1)).sum() for total, mixed in zip(sums, factors, strict=True)
        ]
    return torch.stack(sums)


def _same(now: Digest | Tensor, before: Digest | Tensor) -> bool:
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return torch.equal(now, before.to(now.device))
    # The types differ if the prompt has moved between host and device; its caches are refused then.
    return type(now) is type(before) and now == before


def _facts(encoder: nn.Module) -> tuple[Any, ...]:
    """Return the type, the plain attributes and the hooks of each module."""
    return tuple(
        (
            type(module).__qualname__,
            tuple((key, value) for key, value in vars(module).items() if key != "training" and type(value) in _PLAIN),
            tuple(map(id, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))),
        )
        for module in encoder.modules()
    )


@dataclass(frozen=True)
class Provenance:
    """The prompts that a cache or an encoder's output was computed with.

    Attributes:
        words: the names of the prompts, for messages.
        model: the model's `token_of`.
        prompts: the name and the state of each prompt.
        variants: the prompt variant of each row, or a single variant for all rows; None if unknown.
    """

    words: str
    model: str
    prompts: tuple[tuple[str, Snapshot], ...]
    variants: tuple[int | None, ...] | None = None

    def __deepcopy__(self, _memo: object) -> Provenance:
        """Return the same object: it is immutable, so copies of a cache can share it."""
        return self

    def difference(self, other: Provenance | None) -> str | None:
        """Describe, for a message, how another provenance differs from this one; return None if it does not.

        Args:
            other: the other provenance, or None for the model without a prompt.
        """
        if other is None or other.words != self.words:
            return "others"
        if other.model != self.model:
            return "of another model"
        for (_, now), (_, before) in zip(self.prompts, other.prompts, strict=True):
            if now is not before and not now.equals(before):
                return "changed since"
        if self.variants and other.variants and not _same_rows(self.variants, other.variants):
            return "with other variants (tasks)"
        return None


def _same_rows(now: tuple[int | None, ...], before: tuple[int | None, ...]) -> bool:
    """Whether the rows have the same variants as before, possibly with every row repeated the same number of times (beams)."""
    if len(set(now)) == len(set(before)) == 1:
        return now[0] == before[0]
    if not len(now) or len(now) % len(before):
        return False
    return all(one == before[row // (len(now) // len(before))] for row, one in enumerate(now))
