"""Import optional frameworks, and create classes that derive from theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from softhooks.errors import SoftHooksError


def import_framework(module: str, name: str, extra: str | None = None) -> Any:
    """Import a module of a framework.

    Args:
        module: the full name of the module.
        name: the framework's name in the error message.
        extra: the extra of softhooks that installs the framework, or None if the framework's requirements conflict with
            those of softhooks.

    Raises:
        SoftHooksError: the framework is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        remedy = (
            f"Install {name} in a separate environment, as its documentation describes, and install softhooks there too."
            if extra is None
            else f'Install it: pip install "softhooks[{extra}]".'
        )
        raise SoftHooksError(f"{name} is not installed.", remedy) from error


def create_at_first_use(module: str, **makers: Callable[[], type]) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which creates each class when it is first used.

    Args:
        module: the module's name.
        makers: for each class, a function that creates it.
    """

    def get(name: str) -> Any:
        if name not in makers:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        made = makers[name]()
        made.__module__, made.__qualname__ = module, name
        # stored in the module, because pickling needs the same class at each use
        return vars(sys.modules[module]).setdefault(name, made)

    return get
