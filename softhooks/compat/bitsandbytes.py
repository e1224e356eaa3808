"""Quantized base models: make the Trainer accept them, and prevent bitsandbytes from packing their weights on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from softhooks.errors import TrainerError
from softhooks.patching.patches import Patches

_HAS_ADAPTER = "_hf_peft_config_loaded"
"""The attribute that tells the Trainer that a quantized model has trainable parameters."""


def is_purely_quantized(model: object) -> bool:
    """Whether a model is quantized and has no adapter, so that the Trainer would refuse it."""
    has_adapter = hasattr(model, "peft_config") or getattr(model, _HAS_ADAPTER, False)
    return bool(getattr(model, "is_quantized", False)) and not has_adapter


def require_trainable(model: nn.Module) -> None:
    """Raise a `TrainerError` if no gradients pass through a quantized model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if is_purely_quantized(model) and (quantizer is None or not quantizer.is_trainable):
        raise TrainerError(
            f"no gradients pass through the quantized weights of {type(model).__name__}, so a prompt cannot be trained on it.",
            "Quantize the model with a method that supports training, such as bitsandbytes, or train on the unquantized model.",
            quantized_by=getattr(model, "quantization_method", "an unknown method"),
        )


def mark_trainable(model: nn.Module, patches: Patches) -> None:
    """Make a quantized model look as if it had an adapter, so that the Trainer can be constructed."""
    if is_purely_quantized(model):
        patches.set(model, _HAS_ADAPTER, True)


def unmark_trainable(model: nn.Module, patches: Patches) -> None:
    """Undo `mark_trainable`; otherwise, other code would look for the adapter."""
    patches.restore(model, _HAS_ADAPTER)


# --- bitsandbytes on a CPU --------------------------------------------------------------------------------------------

_PACKS = "support_avx512bf16_for_cpu"
"""The attribute that bitsandbytes sets on 4-bit layers on CPUs with AVX-512 BF16. Their first forward pass in evaluation mode
then packs the weights, which changes the outputs and prevents gradients."""


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Unpack the weights of 4-bit layers, and prevent packing while the `with` block runs."""
    with Patches() as patches:
        for layer in keep_unpacked(model, patches):
            layer.state_dict()  # unpacks in place
        yield


def keep_unpacked(model: nn.Module, patches: Patches) -> list[nn.Module]:
    """Prevent 4-bit layers from packing their weights until the patches are undone; return these layers."""
    layers = [module for module in model.modules() if module.__dict__.get(_PACKS)]
    for layer in layers:
        patches.set(layer, _PACKS, False)
    return layers
