"""Definitions in the source files of softhooks, found without importing torch, as importing those files would."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Definition:
    """A class, a function or a value at the top level of a module, as a syntax tree."""

    node: ast.stmt | ast.expr
    module: str


def find(name: str, module: str) -> Definition | None:
    """Find what a name means in a module of softhooks, through its imports; None if softhooks does not define it."""
    found = _names(module).get(name)
    return find(*found) if isinstance(found, tuple) else None if found is None else Definition(found, module)


def imported(module: str) -> list[Definition]:
    """The definitions that a module imports from modules below its package, in order."""
    found = [find(*target) for target in _names(module).values() if isinstance(target, tuple)]
    return [definition for definition in found if definition is not None and definition.module.startswith(module + ".")]


@cache
def _names(module: str) -> dict[str, ast.stmt | ast.expr | tuple[str, str]]:
    """The top-level names of a module: their definitions, or the name and module that they are imported from."""
    names: dict[str, ast.stmt | ast.expr | tuple[str, str]] = {}
    for node in _statements(ast.parse(_text(module)).body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softhooks."):
            names |= {alias.asname or alias.name: (alias.name, node.module or "") for alias in node.names}
    return names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if TYPE_CHECKING:` too."""
    for node in body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _text(module: str) -> bytes:
    path = "/".join(module.split(".")[1:])
    for file in (f"{path}.py", f"{path}/__init__.py"):
        try:
            return pkgutil.get_data("softhooks", file) or b""
        except FileNotFoundError:
            continue
    raise ModuleNotFoundError(f"the source of {module} is not installed.", name=module)
