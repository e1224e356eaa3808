"""Imports of frameworks that may not be installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from softhooks.errors import SoftHooksError


def import_framework(module: str, name: str, extra: str | None = None) -> Any:
    """Import a module of a framework.

    Args:
        module: the module.
        name: the framework's name in the error.
        extra: the extra of softhooks that installs the framework, or None if its requirements conflict with softhooks.

    Raises:
        SoftHooksError: the framework is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        remedy = (
            f"Install {name} in its own environment, as its documentation says, and softhooks there too."
            if extra is None
            else f'Install it: pip install "softhooks[{extra}]".'
        )
        raise SoftHooksError(f"{name} is not installed.", remedy) from error
