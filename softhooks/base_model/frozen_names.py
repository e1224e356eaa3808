"""Which tensors of a model must not move once a prompt is attached, told by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from softhooks.backbone.container import is_prompt_key


@dataclass(frozen=True)
class _FrozenNames:
    """Tells, by name, which tensors must not move; an object and not a closure, so that it can be pickled."""

    trained: frozenset[str]

    def __call__(self, name: str) -> bool:
        return name not in self.trained and not is_prompt_key(name)


def frozen_names(model: nn.Module) -> Callable[[str], bool]:
    """Tell, by name, which tensors of a model must not move from now on."""
    return _FrozenNames(frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad))
