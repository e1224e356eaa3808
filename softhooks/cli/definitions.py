"""Find definitions in the source code of softhooks without importing it, which would also import torch."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Definition:
    """A top-level class, function or variable, and its module; for a variable, `node` is the assigned expression."""

    node: ast.stmt | ast.expr
    module: str


def find(name: str, module: str) -> Definition | None:
    """Find the definition of a name in a module, following imports; None if softhooks does not define it."""
    found = _names(module).get(name)
    return find(*found) if isinstance(found, tuple) else None if found is None else Definition(found, module)


def imported(package: str) -> list[Definition]:
    """Return the definitions that a package imports from its modules, in order."""
    found = [find(*target) for target in _names(package).values() if isinstance(target, tuple)]
    return [one for one in found if one is not None and one.module.startswith(package + ".")]


@cache
def _names(module: str) -> dict[str, ast.stmt | ast.expr | tuple[str, str]]:
    """Map each top-level name of a module to its definition, or to its original name and module if it is imported."""
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
    """Yield the statements of a module, including those inside `if TYPE_CHECKING:`."""
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
