"""Fast lists of a model's modules and tensors, for use in every forward; `named_modules` is slower, because it builds names."""

from __future__ import annotations

from torch import Tensor, nn


def every_module(module: nn.Module) -> list[nn.Module]:
    """List a module and all modules in it, without duplicates, in no particular order."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None and part not in found:
            found[part] = None
            waiting += part._modules.values()
    return list(found)


def every_tensor(module: nn.Module) -> list[Tensor]:
    """List every parameter and buffer of a module; shared ones may appear twice."""
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            found += part._parameters.values()
            found += part._buffers.values()
            waiting += part._modules.values()
    return [tensor for tensor in found if tensor is not None]
