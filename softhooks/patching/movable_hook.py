"""A forward hook that can be moved after all other hooks of its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class MovableHook:
    """A forward hook that runs after all hooks that were registered before it was registered or last moved.

    Args:
        module: the module to hook.
        hook: the hook, as for `register_forward_hook`.
    """

    def __init__(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._module = module
        self._hook = hook
        self._handle = module.register_forward_hook(hook)

    def move_last(self) -> None:
        """Run after every other hook that the module has now."""
        self._handle.remove()
        self._handle = self._module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
