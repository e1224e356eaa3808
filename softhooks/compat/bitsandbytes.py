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
    """Whether the Trainer would refuse a model because nothing in it seems trainable."""
    return bool(getattr(model, "is_quantized", False)) and not (
        hasattr(model, "peft_config") or getattr(model, _HAS_ADAPTER, False)
    )


def require_trainable(model: nn.Module) -> None:
    """Check that gradients pass through a quantized model.

    Raises:
        TrainerError: they do not.
    """
    if not is_purely_quantized(model):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.is_trainable:
        raise TrainerError(
            f"no gradients pass through the quantized weights of {type(model).__name__}, so that no prompt can train on it.",
            "Quantize with a method that supports training (bitsandbytes), or train on the model without quantization.",
            quantized_by=getattr(model, "quantization_method", "an unknown method"),
        )


def mark_trainable(model: nn.Module, patches: Patches) -> None:
    """Let a quantized model look as if it had an adapter, as long as the Trainer is being constructed."""
    if is_purely_quantized(model):
        patches.set(model, _HAS_ADAPTER, True)


def unmark_trainable(model: nn.Module, patches: Patches) -> None:
    """Undo `mark_trainable`: other code would look for an adapter of PEFT."""
    patches.restore(model, _HAS_ADAPTER)


# --- bitsandbytes on a CPU --------------------------------------------------------------------------------------------

_PACKS = "support_avx512bf16_for_cpu"
"""Set on bitsandbytes' 4-bit layers on CPUs with AVX-512 BF16: the first evaluation packs their weights. From then on they have
other bits and pass no gradient."""


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers from packing their weights in a block of probes; unpack those that are packed."""
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
