"""Find definitions in the source code of softhooks without importing it, because that imports torch."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Definition:
    """A class, a function or a value at the top level of a module.

    Attributes:
        node: its syntax tree; of a value, that of the assigned expression.
        module: the module that defines it.
    """

    node: ast.stmt | ast.expr
    module: str


def find(name: str, module: str) -> Definition | None:
    """Find the definition of a name in a module, following imports; None if softhooks does not define it."""
    found = _names(module).get(name)
    return find(*found) if isinstance(found, tuple) else None if found is None else Definition(found, module)


def imported(package: str) -> list[Definition]:
    """The definitions that a package imports from its own modules, in order."""
    found = [find(*target) for target in _names(package).values() if isinstance(target, tuple)]
    return [
        definition for definition in found if definition is not None and definition.module.startswith(package + ".")
    ]


@cache
def _names(module: str) -> dict[str, ast.stmt | ast.expr | tuple[str, str]]:
    """The top-level names of a module, each with its definition or with the name and module that it is imported from."""
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
    """The statements of a module, including those under `if TYPE_CHECKING:`."""
    for node in body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _text(module: str) -> bytes:
    path = "/".join(module.split(".")[1:])
    for file in (f"{path}.py", f"{path}/__init__.py"):
        try:
            return pkgutil.get_data("softhooks", file) or b""
        except FileNotFoundError:
            continue
    raise ModuleNotFoundError(f"the source code of {module} is not installed.", name=module)
