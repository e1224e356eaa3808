"""Published interfaces of frameworks that cannot be installed here: arguments of hooks and fields of requests, read from
their source.

Where such a framework is installed after all, the tests compare its own source with this record.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def is_installed(framework: str) -> bool:
    """Whether the real package is installed; a stand-in has no spec."""
    try:
        return importlib.util.find_spec(framework) is not None
    except ValueError:
        return False


def arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments."""
    return list(inspect.signature(function).parameters)


def hook(names: Iterable[str], returns: Any = None) -> Callable[..., Any]:
    """A function that takes exactly these arguments, as a stand-in for a hook that does nothing."""
    made: dict[str, Any] = {"returns": returns}
    exec(f"def hook({', '.join(names)}): return returns", made)
    return made["hook"]  # type: ignore[no-any-return]


def read(sent: str, fields: dict[str, str]) -> dict[str, Any]:
    """What a server reads from a request in JSON, as pydantic does it: the published fields with their types, and no others."""
    pydantic = pytest.importorskip("pydantic")
    types: dict[str, Any] = {name: (eval(annotation, dict(vars(typing))), None) for name, annotation in fields.items()}
    request = pydantic.create_model("Request", __config__={"extra": "forbid"}, **types)
    return dict(request.model_validate_json(sent).model_dump(exclude_unset=True))
