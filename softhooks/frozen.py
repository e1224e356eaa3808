"""The proof that nothing else moved: a digest of every frozen tensor, taken at attach and compared at will."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

from softhooks.errors import FrozenModifiedError, explain

_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class FrozenReport:
    """What a check of the frozen tensors has read.

    Attributes:
        tensors: how many parameters and buffers were compared.
        bytes: their size.
        seconds: how long it took.
    """

    tensors: int
    bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """The speed of the check."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"frozen: {self.tensors} tensors, {self.bytes:,} bytes, unchanged ({self.gigabytes_per_second:.1f} GB/s)"


@dataclass(frozen=True)
class _Digest:
    """The fingerprint of one tensor: its bits and what they mean."""

    bits: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def digest(tensor: Tensor) -> _Digest:
    """Fingerprint the exact bits of a tensor (XXH3, 128 bits), on whatever device it lies."""
    if not tensor.numel() or tensor.is_meta:
        return _Digest("", tensor.dtype, tuple(tensor.shape))
    flat = tensor.detach().contiguous().reshape(-1)
    bits = xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).cpu().numpy().data)
    return _Digest(bits, tensor.dtype, tuple(tensor.shape))


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walk every parameter and buffer, shared ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class FrozenRecord:
    """The digests of a model's frozen tensors at one moment.

    Args:
        model: the model; tied tensors are read once.
        is_frozen: tells, by name, which tensors must not move.
    """

    def __init__(self, model: nn.Module, is_frozen: Callable[[str], bool]) -> None:
        self._is_frozen = is_frozen
        self._digests = {name: digest(tensor) for name, tensor in tensors_of(model) if is_frozen(name)}

    def fingerprint(self, names: Iterable[str]) -> str:
        """One digest of the frozen tensors among these."""
        parts = [(name, self._digests[name].bits) for name in sorted(names) if name in self._digests]
        return str(xxhash.xxh3_128_hexdigest(repr(parts).encode()))

    def verify(self, model: nn.Module) -> FrozenReport:
        """Compare every frozen tensor with its digest.

        Raises:
            FrozenModifiedError: naming the tensors that moved, vanished or appeared.
        """
        start = time.perf_counter()
        now = {name: tensor for name, tensor in tensors_of(model) if self._is_frozen(name)}
        moved = [f"{name}: gone" for name in self._digests if name not in now]
        size = 0
        for name, tensor in now.items():
            size += tensor.numel() * tensor.element_size()
            difference = _difference(self._digests.get(name), digest(tensor))
            if difference:
                moved.append(f"{name}: {difference}")
        if moved:
            listed = "; ".join(moved[:_NAMED_AT_MOST]) + ("; ..." if len(moved) > _NAMED_AT_MOST else "")
            raise FrozenModifiedError(
                explain(
                    "every frozen parameter and buffer must keep its bits while a prompt is attached.",
                    "Look for code that writes to the base model: an optimizer that holds its parameters, another "
                    "callback, a conversion of its precision.",
                    moved=f"{len(moved)} of {len(self._digests)} tensors",
                    names=listed,
                )
            )
        return FrozenReport(tensors=len(now), bytes=size, seconds=time.perf_counter() - start)


def _difference(before: _Digest | None, after: _Digest) -> str:
    """Say in words how a tensor differs from its record; empty if it does not."""
    if before is None:
        return "not there at attach"
    if before.dtype != after.dtype:
        return f"precision {before.dtype} became {after.dtype}"
    if before.shape != after.shape:
        return f"shape {list(before.shape)} became {list(after.shape)}"
    return "" if before.bits == after.bits else "values changed"
