"""Models that accelerate has offloaded (`device_map`): their weights are on the CPU or disk and loaded for each forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from softhooks.errors import UnsupportedModelError
from softhooks.patching.patches import Patches

_HOOK_ATTRIBUTES = ("_hf_hook", "_old_forward", "forward")
"""The attributes that accelerate sets on a module when it adds a hook."""


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of its weights, or the one to which accelerate loads them.

    Raises:
        UnsupportedModelError: the module has no weights, or they are on the meta device and no hook loads them.
    """
    weight = next(chain(module.parameters(), module.buffers()), None)
    if weight is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no parameters and no buffers, so its device is unknown.",
            "Attach to the model that contains the token embedding.",
        )
    if not weight.is_meta:
        return weight.device
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    if device is None:
        raise UnsupportedModelError(
            f"the weights of {type(module).__name__} are on the meta device, and no hook loads them.",
            "Load the weights, or let accelerate offload each module separately (without `preload_module_classes`).",
        )
    return torch.device(device)


def read_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Read a tensor of a model, even if it is offloaded to the CPU or disk; return a meta tensor if it cannot be read."""
    if not tensor.is_meta:
        return tensor
    from accelerate.utils.modeling import align_module_device, has_offloaded_params

    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if not has_offloaded_params(owner):
        return tensor
    with align_module_device(owner, torch.device("cpu")):
        loaded: Tensor = getattr(owner, leaf)
        return loaded.detach().clone()


@contextmanager
def without_accelerate_hooks(module: nn.Module) -> Iterator[None]:
    """Remove accelerate's hooks while the `with` block copies a module, so that the copy does not reload offloaded weights."""
    with Patches() as patches:
        for part in module.modules():
            if "_hf_hook" in part.__dict__:
                for name in _HOOK_ATTRIBUTES:
                    patches.delete(part, name)
        yield
