"""Quantized bases: what the Trainer asks of them before any callback exists, and what bitsandbytes does to them on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches

_CARRIES_ADAPTER = "_hf_peft_config_loaded"
"""What the Trainer asks of a quantized model."""


def needs_admission(model: object) -> bool:
    """Whether the Trainer would refuse a model as purely quantized."""
    return bool(getattr(model, "is_quantized", False)) and not (
        hasattr(model, "peft_config") or getattr(model, _CARRIES_ADAPTER, False)
    )


def require_trainable(model: nn.Module) -> None:
    """Check that gradients pass through a quantized model.

    Raises:
        TrainerError: they do not.
    """
    if not needs_admission(model):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_trainable:
        raise TrainerError(
            "a prompt trains on a quantized model only if gradients pass through its weights.",
            "Quantize with a method that trains (bitsandbytes), or train on the model as it is.",
            model=type(model).__name__,
            quantized_by=getattr(model, "quantization_method", "an unknown method"),
        )


def admit(model: nn.Module, patches: Patches) -> None:
    """Say that a quantized model carries trainable parameters, as it does now, until the Trainer has asked."""
    if needs_admission(model):
        patches.set(model, _CARRIES_ADAPTER, True)


def dismiss(model: nn.Module, patches: Patches) -> None:
    """Take back what `admit` said: other code would look for an adapter of PEFT."""
    patches.restore(model, _CARRIES_ADAPTER)


# --- bitsandbytes on a CPU --------------------------------------------------------------------------------------------

_PACKS = "support_avx512bf16_for_cpu"
"""Set on bitsandbytes' 4-bit layers, on CPUs with AVX-512 BF16: the first evaluation packs their weights, and from then on they
pass no gradient and have other bits."""


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers from packing their weights while they are probed; unpack those that have done it."""
    with Patches() as patches:
        for layer in _packing(model):
            patches.set(layer, _PACKS, False)
            layer.state_dict()  # unpacks in place
        yield


def keep_unpacked(model: nn.Module, patches: Patches) -> None:
    """Keep 4-bit layers from packing their weights until the last prompt is removed."""
    for layer in _packing(model):
        patches.set(layer, _PACKS, False)


def _packing(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.__dict__.get(_PACKS)]
