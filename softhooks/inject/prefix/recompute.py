"""Recompute the concatenated keys and values of prefix and text in the backward instead of saving them.

Attention needs a copy of the prefix before each row's keys and values. Autograd would save this copy for every row and layer.
Here only the prefix and the text's keys and values are saved, and the backward concatenates them again.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from softhooks.inject.prefix.key_values import KeyValues

_SHARE = 0.5
"""The minimum length of a prefix that is recomputed, as a fraction of the text's length."""

_HOOKS = ("_top_saved_tensors_default_hooks", "_saved_tensors_hooks_is_enabled")
"""Private functions of torch; if they are missing, everything is saved as usual."""


def recomputed(prefix: KeyValues, index: int, text: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> Any:
    """Return a context in which autograd recomputes the concatenated keys and values in the backward instead of saving them.

    Args:
        index: the index of the attention layer.
        text: the text's keys and values, [B, Hk, K, D].
        whole: the concatenated keys and values, from `KeyValues.before`.
    """
    heads = (prefix.keys[index], prefix.values[index])
    if not _pays(prefix, text[0]) or not all(map(_keeps, heads)) or _is_hooked():
        return nullcontext()
    made = _Recomputed(heads, text, whole)
    return saved_tensors_hooks(made._pack, made._unpack)


def _pays(prefix: KeyValues, key: Tensor) -> bool:
    batch, _, columns, _ = key.shape
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or key.is_meta:
        return False
    return batch > 1 and prefix.variants == 1 and prefix.length >= _SHARE * columns


def _keeps(part: Tensor) -> bool:
    """Whether a tensor of the prefix keeps its value until the backward; an optimizer step may change a parameter before then."""
    base = part._base if part._is_view() else part
    return base is not None and not (base.is_leaf and base.requires_grad)


def _is_hooked() -> bool:
    """Whether other saved-tensor hooks are active (checkpointing, offloading), or hooks are forbidden (`torch.func`)."""
    top, may = (getattr(torch._C._autograd, name, None) for name in _HOOKS)
    return top is None or may is None or not may() or top(True) is not None


class _Recomputed:
    """Saved-tensor hooks that recompute one layer's concatenated keys and values, which they recognize by their storage."""

    def __init__(self, heads: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> None:
        self._parts = {
            made.untyped_storage().data_ptr(): (head.detach(), own.detach())
            for head, own, made in zip(heads, text, whole, strict=True)
        }

    def _pack(self, kept: Tensor) -> Any:
        parts = self._parts.get(kept.untyped_storage().data_ptr())
        if parts is None or kept.dtype != parts[1].dtype:
            return kept
        return parts, [part._version for part in parts], kept.shape, kept.stride(), kept.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        (head, own), versions, *view = packed
        if versions != [head._version, own._version]:
            # Autograd does the same for the tensors that it saves.
            raise RuntimeError("keys or values that the backward needs have been modified in place since the forward.")
        with torch.no_grad():
            made = torch.cat([head.to(own).expand(len(own), -1, -1, -1), own], dim=2)
        return made.as_strided(*view)
