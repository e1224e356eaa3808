"""Whether the modules that a prompt enters at, or answers for, are still those that were found at attach.

A module that is put in the place of one of them has no hook and no mark: it would run without the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError


class Standing:
    """Where modules stand below another one.

    Args:
        modules: as they are at attach.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._wanted = list(modules)
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: it finds the places in its own model."""
        return {"_wanted": self._wanted, "_places": None}

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Watch over more modules."""
        self._wanted += [module for module in modules if all(module is not one for one in self._wanted)]
        self._places = None

    def check(self, root: nn.Module) -> None:
        """Check that each stands where it did, or somewhere below the root: asked once a forward.

        Raises:
            UnsupportedModeError: one of them has been replaced.
        """
        places = self._places
        if places is None or any(parent.get(name) is not module for parent, name, module in places):
            self._places = self._find(root)

    def _find(self, root: nn.Module) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
        paths = {id(module): path for path, module in root.named_modules(remove_duplicate=False)}
        gone = [type(module).__name__ for module in self._wanted if id(module) not in paths]
        if gone:
            raise UnsupportedModeError(
                "the modules that a prompt enters at must be those that the model had when it was attached.",
                "Put the old ones back, or save the prompt, remove it, and load it onto the model as it is now.",
                model=type(root).__name__,
                replaced=", ".join(dict.fromkeys(gone)),
            )
        places: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for module in self._wanted:
            parent = root
            for name in filter(None, paths[id(module)].split(".")):
                child = parent._modules[name]
                assert child is not None
                places[id(parent), name] = parent._modules, name, child
                parent = child
        return list(places.values())


def entered(stack: Stack) -> list[nn.Module]:
    """The embedding and the poolers, where they are parts of the stack, and every attention module."""
    inside = {id(module) for module in stack.module.modules()}
    poolers = (stack.pooled, getattr(stack.module, "pooler", None))
    wanted = {id(module): module for module in (stack.embedding, *poolers, *(site.module for site in stack.sites))}
    return [module for key, module in wanted.items() if key in inside and module is not None]
