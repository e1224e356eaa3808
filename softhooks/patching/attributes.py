"""Attributes that are set on instances, until what was there is put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


class _Absent:
    """Says that nothing was there. The class itself is used, never an instance: a copy of a class is the class."""


@dataclass(frozen=True)
class Override:
    """An attribute that was set on an instance, and what was there."""

    module: nn.Module
    attribute: str
    before: Any
    value: Any

    def undo(self) -> None:
        """Put back what was there, unless somebody else has put something on top."""
        own = self.module.__dict__
        if own.get(self.attribute) is not self.value:
            return
        if self.before is _Absent:
            del own[self.attribute]
        else:
            own[self.attribute] = self.before


class Overrides:
    """What was set, in its order."""

    def __init__(self) -> None:
        self._set: list[Override] = []

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute on an instance."""
        self._set.append(Override(module, attribute, module.__dict__.get(attribute, _Absent), value))
        module.__dict__[attribute] = value

    def restore(self, module: nn.Module, attribute: str) -> None:
        """Take back what was set last on an instance under a name, if anything was."""
        for override in reversed(self._set):
            if override.module is module and override.attribute == attribute:
                self._set.remove(override)
                override.undo()
                return

    def values(self) -> list[Any]:
        """What is set now."""
        return [override.value for override in self._set]

    def undo(self) -> None:
        """Take everything back, the last first."""
        for override in reversed(self._set):
            override.undo()
        self._set.clear()
