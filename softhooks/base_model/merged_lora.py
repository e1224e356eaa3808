"""Compute how merging PEFT's LoRA adapters would change individual values of the base weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.compat.sharding import is_sharded

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraWeight:
    """A base weight with LoRA: the PEFT layer that wraps it, and the names of the active adapters that are not merged."""

    layer: Any
    adapters: tuple[str, ...]

    def delta(self, indices: Tensor, width: int) -> Tensor:
        """Return how merging would change the values at these indices of the flattened weight, in fp32.

        Args:
            width: the weight's last dimension.
        """
        rows, columns = indices // width, indices % width
        if self.layer.fan_in_fan_out:
            rows, columns = columns, rows
        total = torch.zeros(indices.shape, device=indices.device)
        for name in self.adapters:
            lora_a, lora_b = self.layer.lora_A[name].weight, self.layer.lora_B[name].weight
            terms = lora_b.detach()[rows].float() * lora_a.detach()[:, columns].T.float()
            total += terms.sum(-1) * self.layer.scaling[name]
        return total


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is quantized and therefore contains codes instead of values."""
    is_plain = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    return not is_plain or weight.dtype not in _FLOATS


def is_readable(weight: Tensor) -> bool:
    """Whether individual values of a weight can be read in this process."""
    return not (is_packed(weight) or is_sharded(weight) or weight.is_meta or not weight.numel())


def adapted_weights(model: nn.Module) -> dict[int, LoraWeight]:
    """Find the weights that merging the active adapters would change, keyed by `id(weight)`.

    The result is empty if an adapter is not plain LoRA on a linear layer (DoRA, LoHa, embeddings, biases, trainable tokens), or
    if a weight is quantized, sharded or offloaded: the merged values are then unknown.
    """
    layers, tuners = (sys.modules.get(f"peft.{name}") for name in ("tuners.lora.layer", "tuners.tuners_utils"))
    found: dict[int, LoraWeight] = {}
    if layers is None or tuners is None:
        return found
    for layer in model.modules():
        if not isinstance(layer, tuners.BaseTunerLayer) or layer.disable_adapters:
            continue
        active = [name for name in layer.active_adapters if name not in layer.merged_adapters]
        active = [name for name in active if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names)]
        if not active:
            continue
        if type(layer) is not layers.Linear or not all(_is_plain(layer, name) for name in active):
            return {}
        found[id(layer.get_base_layer().weight)] = LoraWeight(layer, tuple(active))
    return found


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter only adds the product of two matrices to a linear layer, and all weights can be read."""
    if name in layer.lora_variant or layer.lora_bias.get(name) or name not in layer.lora_A:
        return False
    weights = (layer.get_base_layer().weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    return all(is_readable(weight) for weight in weights)
