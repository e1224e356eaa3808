"""Check that the modules with a prompt's hooks have not been replaced by modules without hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError


class ExpectedModules:
    """Modules that must stay inside the model."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._expected = list(modules)
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the modules' places in the model; a copy must look them up in its own model."""
        return {"_expected": self._expected, "_places": None}

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Add modules to check."""
        self._expected += [module for module in modules if all(module is not one for one in self._expected)]
        self._places = None

    def check(self, root: nn.Module) -> None:
        """Refuse a forward if a module is no longer inside `root`; a module that was moved within it is accepted."""
        places = self._places
        if places is None or any(parent.get(name) is not module for parent, name, module in places):
            self._places = self._find(root)

    def _find(self, root: nn.Module) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
        paths = {id(module): path for path, module in root.named_modules(remove_duplicate=False)}
        gone = [type(module).__name__ for module in self._expected if id(module) not in paths]
        if gone:
            raise UnsupportedModeError(
                f"modules of {type(root).__name__} have been replaced since the prompt was attached "
                f"({', '.join(dict.fromkeys(gone))}); the modules that a prompt enters must stay in the model.",
                "Restore the old modules, or save the prompt, remove it, and load it onto the changed model.",
            )
        places: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for module in self._expected:
            parent = root
            for name in filter(None, paths[id(module)].split(".")):
                child = parent._modules[name]
                assert child is not None
                places[id(parent), name] = parent._modules, name, child
                parent = child
        return list(places.values())


def modules_entered(stack: Stack) -> list[nn.Module]:
    """List the modules of a stack that prompts enter: the embedding, the poolers and every attention module."""
    inside = {id(module) for module in stack.module.modules()}
    poolers = (stack.pooled_module, getattr(stack.module, "pooler", None))
    wanted = {id(module): module for module in (stack.embedding, *poolers, *(site.module for site in stack.sites))}
    return [module for key, module in wanted.items() if key in inside and module is not None]
