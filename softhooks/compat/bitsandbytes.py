"""Quantized base models: let the Trainer accept them, and keep bitsandbytes from packing their weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches

_HAS_ADAPTER = "_hf_peft_config_loaded"
"""The attribute by which the Trainer decides whether a quantized model has trainable parameters."""


def is_purely_quantized(model: object) -> bool:
    """Whether the Trainer would refuse a quantized model because it sees no trainable parameters."""
    return bool(getattr(model, "is_quantized", False)) and not (
        hasattr(model, "peft_config") or getattr(model, _HAS_ADAPTER, False)
    )


def require_trainable(model: nn.Module) -> None:
    """Check that gradients pass through a quantized model.

    Raises:
        TrainerError: gradients do not pass through the model.
    """
    if not is_purely_quantized(model):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_trainable:
        raise TrainerError(
            f"no gradients pass through the quantized weights of {type(model).__name__}, so a prompt cannot be trained on it.",
            "Quantize with a method that supports training (bitsandbytes), or train on the unquantized model.",
            quantized_by=getattr(model, "quantization_method", "an unknown method"),
        )


def mark_trainable(model: nn.Module, patches: Patches) -> None:
    """Make a quantized model look as if it had an adapter while the Trainer is constructed."""
    if is_purely_quantized(model):
        patches.set(model, _HAS_ADAPTER, True)


def unmark_trainable(model: nn.Module, patches: Patches) -> None:
    """Undo `mark_trainable`, because other code would look for a PEFT adapter."""
    patches.restore(model, _HAS_ADAPTER)


# --- bitsandbytes on a CPU --------------------------------------------------------------------------------------------

_PACKS = "support_avx512bf16_for_cpu"
"""The attribute that bitsandbytes sets on 4-bit layers on CPUs with AVX-512 BF16. The first evaluation then packs their weights,
which changes the bits and blocks gradients."""


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers from packing their weights while the `with` block runs probes, and unpack packed layers."""
    with Patches() as patches:
        for layer in _packing_layers(model):
            patches.set(layer, _PACKS, False)
            layer.state_dict()  # unpacks in place
        yield


def keep_unpacked(model: nn.Module, patches: Patches) -> None:
    """Keep 4-bit layers from packing their weights until the patches are undone."""
    for layer in _packing_layers(model):
        patches.set(layer, _PACKS, False)


def _packing_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.__dict__.get(_PACKS)]
