"""Models whose weights accelerate keeps on the CPU or on disk and brings in for each forward (`device_map`, `cpu_offload`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.errors import UnsupportedModelError

_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What accelerate sets on the instance of a module that it looks after."""


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, or will lie once they were brought in.

    Raises:
        UnsupportedModelError: its weights lie nowhere, and nothing brings them in.
    """
    weight = next(chain(module.parameters(), module.buffers()), None)
    if weight is None:
        raise UnsupportedModelError(
            "a soft prompt needs a module with weights, to lie where they lie.",
            "Attach to the model that holds the embedding of its tokens.",
            module=f"{type(module).__name__}, without parameters and buffers",
        )
    if not weight.is_meta:
        return weight.device
    hook = module.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is None:
        raise UnsupportedModelError(
            "a soft prompt needs a model whose weights are there.",
            "Load the weights, or let accelerate offload each module by itself (without `preload_module_classes`).",
            module=type(module).__name__,
            weights="on the meta device, with no hook that brings them in",
        )
    return torch.device(device)


def read(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Read a tensor of a model that may be offloaded; one that cannot be read stays on the meta device."""
    if not tensor.is_meta:
        return tensor
    from accelerate.utils.modeling import align_module_device, has_offloaded_params

    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if not has_offloaded_params(owner):
        return tensor
    with align_module_device(owner, torch.device("cpu")):
        brought: Tensor = getattr(owner, leaf)
        return brought.detach().clone()


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Take accelerate's hooks off, to copy a module: a copy must not bring in the weights of the original."""
    taken: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        own = part.__dict__
        if "_hf_hook" in own:
            taken.append((own, {key: own.pop(key) for key in _HOOKED if key in own}))
    try:
        yield
    finally:
        for own, attributes in taken:
            own.update(attributes)
