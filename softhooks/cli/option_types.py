"""Read the types of options from annotations, describe them in words, and convert values to them."""

from __future__ import annotations

import ast
import collections.abc
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from softhooks.cli.definitions import find

YES, NO = ("true", "yes", "1"), ("false", "no", "0")
_SEQUENCES = (Sequence, Iterable, list, tuple)
_WORDS = {bool: "yes or no", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class OnlyInPython:
    """Placeholder for a type whose values only Python code can create."""


class LayoutText:
    """Placeholder for `Layout`, because importing `Layout` would import torch."""

    def __new__(cls, text: str) -> Any:
        """Create the layout."""
        from softhooks.layout.layout import Layout

        return Layout(text)


_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (*_WORDS, *_SEQUENCES, Mapping)},
    "Any": Any,
    "dict": Mapping,
    "Layout": LayoutText,
}


def read_annotation(node: ast.expr, module: str) -> Any:
    """Evaluate an annotation, looking up aliases and imports in the module that contains it."""
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.BinOp):
        return Union[read_annotation(node.left, module), read_annotation(node.right, module)]  # noqa: UP007
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return Literal[ast.literal_eval(node.slice)]
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        origin = read_annotation(node.value, module)
        return origin[tuple(read_annotation(part, module) for part in inner)] if origin in _SEQUENCES else origin
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return _TYPES[node.id]
    found = find(node.id, module) if isinstance(node, ast.Name) else None
    return read_annotation(found.node, found.module) if found and isinstance(found.node, ast.expr) else OnlyInPython


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union, without None. A path comes last, because every string could be a path."""
    kinds = list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]
    # `typing` caches unions: after `Union[Path, str]` anywhere in the process, `Union[str, Path]` has that order too.
    return sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: kind is Path)


def describe(hint: Any) -> str:
    """Describe the values of a type in words; return an empty string if only Python code can create them."""
    return " or ".join(filter(None, map(_describe_one, alternatives(hint))))


def _describe_one(kind: Any) -> str:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return "a name or text"
    if kind is LayoutText:
        return "text (Layout)"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in _SEQUENCES:
        items = _describe_one(inner[0])
        return f"a list ({items} each)" if items else ""
    if origin is Mapping:
        return "a mapping"
    return _WORDS.get(kind, "")


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from a file, or a string from a command line, to the type `hint`; raise ValueError if it is invalid."""
    if value is None and (hint is Any or type(None) in typing.get_args(hint)):
        return None
    for kind in sorted(alternatives(hint), key=_breadth):
        try:
            return _convert_one(value, kind)
        except ValueError:
            continue
    raise ValueError(value)


def _breadth(kind: Any) -> int:
    """Return a sort key for the types of a union; types that accept more strings are tried later."""
    if kind in (str, Any, Path):
        return 2
    return int((typing.get_origin(kind) or kind) in _SEQUENCES or kind is LayoutText)


def _convert_one(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return _checked(value in inner, value)
    if origin in _SEQUENCES:
        parts = _from_json(value)
        parts = parts if isinstance(parts, (list, tuple)) else [_checked(isinstance(value, str), value)]
        return tuple(convert(part, inner[0]) for part in parts)
    if origin is collections.abc.Mapping:
        return _checked(isinstance(loaded := _from_json(value), dict), loaded)
    if kind is bool:
        text = str(value).lower()
        return _checked(text in YES + NO, text in YES)
    if kind in (int, float):
        number = _checked(isinstance(value, (int, float, str)) and not isinstance(value, bool), value)
        return kind(number) if isinstance(number, str) or kind is float else _checked(isinstance(number, int), number)
    text = _checked(kind in (str, Path, LayoutText) and isinstance(value, str), value)
    return kind(text)


def _from_json(value: Any) -> Any:
    """Parse a string as JSON; return other values, and strings that are not JSON, unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # not JSON, a number with too many digits, or nested too deeply
        return value


def _checked(fits: bool, value: Any) -> Any:
    if not fits:
        raise ValueError(value)
    return value
