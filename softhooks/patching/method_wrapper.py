"""Wrappers that replace a method on a model instance and run code around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class MethodWrapper:
    """Base class of method wrappers. They are not closures, so that a deep copy of the model calls its own method.

    Args:
        model: the model whose method it is.
        name: the name of the method.

    Attributes:
        before: an earlier replacement on the instance, which this wrapper calls, or None for the method of the class.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.before: Callable[..., Any] | None = model.__dict__.get(name)

    def original(self) -> Callable[..., Any]:
        """Return the method that was replaced."""
        if self.before is not None:
            return self.before
        kind = type(self.model)
        own: Callable[..., Any] = inspect.getattr_static(kind, self.name).__get__(self.model, kind)
        return own
