"""Record a hash of every frozen tensor during `attach`, and check later that none of them has changed."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import xxhash
from torch import Tensor, nn

from softhooks.backbone.container import is_prompt_key
from softhooks.compat.offload import read_tensor
from softhooks.compat.sharding import full
from softhooks.errors import FrozenModifiedError

_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class FrozenReport:
    """The result of a check that the frozen tensors are unchanged.

    Attributes:
        tensors: the number of parameters, buffers and scales of quantized weights that were compared.
        bytes: the size of these tensors.
        seconds: the duration of the check.
        unread: the names of tensors that could not be read: they are on the meta device, and no hook loads them.
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
        return read + (f"; could not be read: {_listed(self.unread)}" if self.unread else "")


@dataclass(frozen=True)
class Digest:
    """The hash of a tensor's bits, with its dtype and shape."""

    bits: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def digest(tensor: Tensor) -> Digest:
    """Hash the bits of a tensor (XXH3, 128 bits); a sharded tensor is gathered first."""
    if not tensor.numel() or tensor.is_meta:
        return Digest("", tensor.dtype, tuple(tensor.shape))
    flat = full(tensor.detach()).contiguous().reshape(-1)
    flat = flat.cpu()
    # Read from the address: `numpy()` would make the storage one that FSDP2 cannot free and resize.
    memory = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
    bits = xxhash.xxh3_128_hexdigest(memory)
    return Digest(bits, tensor.dtype, tuple(tensor.shape))


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers, and the scales of quantized layers; offloaded tensors are loaded one at a time."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, read_tensor(model, name, tensor)
    for name, module in model.named_modules():
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            yield from _unregistered(name, module)


def _unregistered(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a layer's state dict that are not registered parameters or buffers, such as bitsandbytes' scales."""
    prefix = f"{name}." if name else ""
    known = {prefix + own for own in (*module._parameters, *module._buffers)}
    saved: dict[str, object] = {}
    module._save_to_state_dict(saved, prefix, True)
    yield from ((key, value) for key, value in saved.items() if isinstance(value, Tensor) and key not in known)


def _is_not_trained(trained: frozenset[str], name: str) -> bool:
    return name not in trained and not is_prompt_key(name)


class FrozenRecord:
    """The hashes of a model's frozen tensors, taken when the record is created.

    Args:
        model: the model; tied tensors are read once.
        is_frozen: called with a tensor's name; returns whether the tensor must not change. By default, a tensor must not change
            if it is not trainable when the record is created and does not belong to a prompt.

    Attributes:
        digests: the hashes by name.
    """

    def __init__(self, model: nn.Module, is_frozen: Callable[[str], bool] | None = None) -> None:
        if is_frozen is None:
            trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
            is_frozen = partial(_is_not_trained, trained)  # a closure could not be pickled
        self._is_frozen = is_frozen
        self.digests = {name: digest(tensor) for name, tensor in tensors_of(model) if is_frozen(name)}

    def fingerprint(self, names: Iterable[str]) -> str:
        """Hash the digests of the tensors with these names."""
        parts = [(name, self.digests[name].bits) for name in sorted(names) if name in self.digests]
        return str(xxhash.xxh3_128_hexdigest(repr(parts).encode()))

    def converted(self, model: nn.Module) -> list[str]:
        """Describe each frozen tensor whose dtype or shape has changed; values are not compared."""
        found = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            known = self.digests.get(name)
            if known is not None and (known.dtype, known.shape) != (tensor.dtype, tuple(tensor.shape)):
                found.append(f"{name}: {_difference(known, Digest('', tensor.dtype, tuple(tensor.shape)))}")
        return found

    def verify(self, model: nn.Module, **where: object) -> FrozenReport:
        """Check that no frozen tensor has changed, is missing or was added.

        Args:
            where: values to add to the error, such as the training step.

        Raises:
            FrozenModifiedError: a frozen tensor differs; the error names it.
        """
        start = time.perf_counter()
        changed, unread, missing, size = [], [], dict.fromkeys(self.digests), 0
        for name, tensor in tensors_of(model):
            if not self._is_frozen(name):
                continue
            missing.pop(name, None)
            difference = _difference(self.digests.get(name), digest(tensor))
            if difference:
                changed.append(f"{name}: {difference}")
            elif tensor.is_meta:
                unread.append(name)
            else:
                size += tensor.numel() * tensor.element_size()
        changed += [f"{name}: gone" for name in missing]
        if changed:
            raise FrozenModifiedError(
                f"{len(changed)} of {len(self.digests)} frozen tensors have changed since the prompt was attached; each must "
                "stay bit-identical.",
                "Look for code that writes to the base model, such as an optimizer that holds its parameters, another "
                "callback, or a dtype conversion.",
                changed=_listed(changed),
                **where,
            )
        count = len(self.digests) - len(unread)
        return FrozenReport(count, size, time.perf_counter() - start, tuple(unread))


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:_NAMED_AT_MOST]) + ("; ..." if len(names) > _NAMED_AT_MOST else "")


def _difference(before: Digest | None, after: Digest) -> str:
    """Describe how a tensor has changed; an empty string means that it has not."""
    if before is None:
        return "did not exist when the prompt was attached"
    if before.dtype != after.dtype:
        return f"dtype changed from {before.dtype} to {after.dtype}"
    if before.shape != after.shape:
        return f"shape changed from {list(before.shape)} to {list(after.shape)}"
    return "" if before.bits == after.bits else "values changed"
