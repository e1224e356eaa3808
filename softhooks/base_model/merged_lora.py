"""What the adapters of PEFT make of single numbers of the weights that they are merged into."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.compat.sharding import is_sharded

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapted:
    """A weight under LoRA.

    Attributes:
        layer: PEFT's layer around the module that has the weight.
        adapters: the names of those that are on, and not merged.
    """

    layer: Any
    adapters: tuple[str, ...]

    def change(self, index: Tensor, width: int) -> Tensor:
        """What merging adds to the weight at some places, fp32.

        Args:
            index: places in the flattened weight.
            width: its last dimension.
        """
        rows, columns = index // width, index % width
        if self.layer.fan_in_fan_out:
            rows, columns = columns, rows
        total = torch.zeros(index.shape, device=index.device)
        for name in self.adapters:
            into, out = self.layer.lora_A[name].weight, self.layer.lora_B[name].weight
            terms = out.detach()[rows].float() * into.detach()[:, columns].T.float()
            total += terms.sum(-1) * self.layer.scaling[name]
        return total


def is_packed(weight: Tensor) -> bool:
    """Whether the numbers of a weight are codes of a quantizer."""
    plain = type(weight) in (Tensor, nn.Parameter) or is_sharded(weight)
    return not plain or weight.dtype not in FLOATS


def is_whole(weight: Tensor) -> bool:
    """Whether the numbers of a weight can be read one by one here."""
    return not (is_packed(weight) or is_sharded(weight) or weight.is_meta or not weight.numel())


def adapted_weights(model: nn.Module) -> dict[int, Adapted]:
    """The weights that merging the adapters that are on would change, by their id.

    None are told where it is not known of all of them what they would become: adapters other than plain LoRA on linear layers
    (DoRA, LoHa, embeddings, biases, rows of tokens), and weights that are quantized, sharded or offloaded.
    """
    layers, tuners = (sys.modules.get(f"peft.{name}") for name in ("tuners.lora.layer", "tuners.tuners_utils"))
    found: dict[int, Adapted] = {}
    if layers is None or tuners is None:
        return found
    for layer in model.modules():
        if not isinstance(layer, tuners.BaseTunerLayer) or layer.disable_adapters:
            continue
        on = [name for name in layer.active_adapters if name not in layer.merged_adapters]
        on = [name for name in on if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names)]
        if not on:
            continue
        if type(layer) is not layers.Linear or not all(_is_plain(layer, name) for name in on):
            return {}
        found[id(layer.get_base_layer().weight)] = Adapted(layer, tuple(on))
    return found


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter of a linear layer adds the product of two matrices that are here, and nothing else."""
    if name in layer.lora_variant or layer.lora_bias.get(name) or name not in layer.lora_A:
        return False
    weights = (layer.get_base_layer().weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    return all(is_whole(weight) for weight in weights)
