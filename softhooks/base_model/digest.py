"""The proof that nothing else moved: a digest of every frozen tensor, taken at attach and compared at will."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

from softhooks.compat.offload import read
from softhooks.compat.sharding import full
from softhooks.errors import FrozenModifiedError

_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class FrozenReport:
    """What a check of the frozen tensors has read.

    Attributes:
        tensors: how many parameters and buffers were compared, and scales of quantized weights.
        bytes: their size.
        seconds: how long it took.
        unread: the names of those that could not be read, for they lie on the meta device and nothing brings them in.
    """

    tensors: int
    bytes: int
    seconds: float
    unread: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """The speed of the check."""
        return self.bytes / 1e9 / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        read = f"frozen: {self.tensors} tensors, {self.bytes:,} bytes, unchanged ({self.gigabytes_per_second:.1f} GB/s)"
        return read + (f"; not to be read: {_listed(self.unread)}" if self.unread else "")


@dataclass(frozen=True)
class Digest:
    """The fingerprint of one tensor: its bits and what they mean."""

    bits: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def digest(tensor: Tensor) -> Digest:
    """Fingerprint the exact bits of a tensor (XXH3, 128 bits), on whatever device it lies; a sharded one as a whole."""
    if not tensor.numel() or tensor.is_meta:
        return Digest("", tensor.dtype, tuple(tensor.shape))
    flat = full(tensor.detach()).contiguous().reshape(-1)
    bits = xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).cpu().numpy().data)
    return Digest(bits, tensor.dtype, tuple(tensor.shape))


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walk every parameter and buffer, shared once, offloaded brought in one by one; then what quantized layers hold."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, read(model, name, tensor)
    for name, module in model.named_modules():
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            yield from _beside(name, module)


def _beside(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a layer saves beside its parameters and buffers: bitsandbytes' scales, which are neither, and may move about in it."""
    prefix = f"{name}." if name else ""
    known = {prefix + own for own in (*module._parameters, *module._buffers)}
    saved: dict[str, object] = {}
    module._save_to_state_dict(saved, prefix, True)
    yield from ((key, value) for key, value in saved.items() if isinstance(value, Tensor) and key not in known)


class FrozenRecord:
    """The digests of a model's frozen tensors at one moment.

    Args:
        model: the model; tied tensors are read once.
        is_frozen: tells, by name, which tensors must not move.
    """

    def __init__(self, model: nn.Module, is_frozen: Callable[[str], bool]) -> None:
        self._is_frozen = is_frozen
        self._digests = {name: digest(tensor) for name, tensor in tensors_of(model) if is_frozen(name)}

    @property
    def digests(self) -> Mapping[str, Digest]:
        """The digests, by name."""
        return self._digests

    def fingerprint(self, names: Iterable[str]) -> str:
        """One digest of the frozen tensors among these."""
        parts = [(name, self._digests[name].bits) for name in sorted(names) if name in self._digests]
        return str(xxhash.xxh3_128_hexdigest(repr(parts).encode()))

    def converted(self, model: nn.Module) -> list[str]:
        """Name the frozen tensors that have another precision or shape than their record; no bits are read."""
        found = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            known = self._digests.get(name)
            if known is not None and (known.dtype, known.shape) != (tensor.dtype, tuple(tensor.shape)):
                found.append(f"{name}: {_difference(known, Digest('', tensor.dtype, tuple(tensor.shape)))}")
        return found

    def verify(self, model: nn.Module, **where: object) -> FrozenReport:
        """Compare every frozen tensor with its digest.

        Args:
            model: the model.
            where: what else to say of the moment, should one have moved.

        Raises:
            FrozenModifiedError: naming the tensors that moved, vanished or appeared.
        """
        start = time.perf_counter()
        moved, unread, gone, size = [], [], dict.fromkeys(self._digests), 0
        for name, tensor in tensors_of(model):
            if not self._is_frozen(name):
                continue
            gone.pop(name, None)
            difference = _difference(self._digests.get(name), digest(tensor))
            if difference:
                moved.append(f"{name}: {difference}")
            elif tensor.is_meta:
                unread.append(name)
            else:
                size += tensor.numel() * tensor.element_size()
        moved += [f"{name}: gone" for name in gone]
        if moved:
            raise FrozenModifiedError(
                "every frozen parameter and buffer must keep its bits while a prompt is attached.",
                "Look for code that writes to the base model: an optimizer that holds its parameters, another "
                "callback, a conversion of its precision.",
                moved=f"{len(moved)} of {len(self._digests)} tensors",
                names=_listed(moved),
                **where,
            )
        count = len(self._digests) - len(unread)
        return FrozenReport(count, size, time.perf_counter() - start, tuple(unread))


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:_NAMED_AT_MOST]) + ("; ..." if len(names) > _NAMED_AT_MOST else "")


def _difference(before: Digest | None, after: Digest) -> str:
    """Say in words how a tensor differs from its record; empty if it does not."""
    if before is None:
        return "not there at attach"
    if before.dtype != after.dtype:
        return f"precision {before.dtype} became {after.dtype}"
    if before.shape != after.shape:
        return f"shape {list(before.shape)} became {list(after.shape)}"
    return "" if before.bits == after.bits else "values changed"
