"""Options as text: what the fields of a method and the arguments of a callback take on a command line or in a file.

Everything here is read from the classes themselves: their fields, types, defaults and docstrings.
"""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from softhooks.errors import OptionError

if TYPE_CHECKING:
    from softhooks.method import Method

YES, NO = ("true", "yes", "1"), ("false", "no", "0")
_LISTS = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, list, tuple)
_MAPPINGS = (collections.abc.Mapping, dict)
_WORDS = {bool: "yes or no", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: as Python spells it.
        hint: its type.
        default: its default, or `dataclasses.MISSING`.
        about: what its docstring says.
    """

    name: str
    hint: Any
    default: Any
    about: str

    @property
    def flag(self) -> str:
        """As a command line spells it."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether it is given without a value, or with `no-` before its name."""
        return [kind for kind in _alternatives(self.hint) if kind is not type(None)] == [bool]

    @property
    def takes(self) -> str:
        """What it takes, in words; empty where only Python can give it."""
        words = [_describe(kind) for kind in _alternatives(self.hint) if kind is not type(None)]
        return " or ".join(word for word in words if word)

    def read(self, value: Any) -> Any:
        """Take a value from a file, or a text (or several) from a command line.

        Raises:
            OptionError: the value has another type, or only Python can give one.
        """
        if not self.takes:
            raise OptionError(
                f"{self.flag} takes what only Python can make.",
                "Leave it out here, or call `softhooks.attach` in the script.",
                takes=getattr(self.hint, "__name__", str(self.hint)),
                given=repr(value),
            )
        try:
            return _convert(value, self.hint)
        except ValueError:
            raise OptionError(
                f"an option must have its type: {self.flag}.",
                f"Write `{self.flag}`, or `--no-{self.flag[2:]}`."
                if self.is_switch
                else f"Give {self.takes}; a list is written as [1, 2] or by repeating the option.",
                takes=self.takes,
                given=repr(value),
            ) from None


def method_options(method: type[Method]) -> dict[str, Option]:
    """The options of a method, by name."""
    about = _about(*(base.__doc__ for base in method.__mro__))
    return {
        item.name: Option(item.name, _hint(method, item), item.default, about.get(item.name, ""))
        for item in dataclasses.fields(method)
    }


def _hint(method: type[Method], item: dataclasses.Field[Any]) -> Any:
    """Resolve a field's type where it was declared; what only type checkers import there, only Python can give."""
    owner = next(base for base in method.__mro__ if item.name in inspect.get_annotations(base))
    alone = type("Field", (), {"__annotations__": {item.name: item.type}})
    return typing.get_type_hints(alone, localns=_Names(vars(sys.modules[owner.__module__])))[item.name]


class _Names(dict[str, Any]):
    """The names of a module, and a stand-in for those that it does not have when it runs."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, _OnlyInPython)


class _OnlyInPython:
    """The stand-in."""


def argument_options(function: Callable[..., Any], *docs: str | None) -> dict[str, Option]:
    """The keyword-only arguments of a function, by name; their descriptions are the first that the docstrings have."""
    hints = typing.get_type_hints(function)
    about = _about(*docs)
    return {
        name: Option(name, hints[name], item.default, about.get(name, ""))
        for name, item in inspect.signature(function).parameters.items()
        if item.kind is item.KEYWORD_ONLY
    }


def summary(documented: type) -> str:
    """The first sentence of a docstring, without markup."""
    return inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("`", "")


def _about(*docs: str | None) -> dict[str, str]:
    """Read the `Args` of docstrings; the first that describes an argument is kept, a mere reference is not."""
    found: dict[str, str] = {}
    for doc in docs:
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", inspect.cleandoc(doc or ""), re.MULTILINE)
        for names, text in re.findall(
            r"^ {4}(\w[\w, ]*): ((?:.*\n?)(?: {8}.*\n?)*)", section[1] if section else "", re.M
        ):
            if not text.startswith("as in"):
                for name in names.split(", "):
                    found.setdefault(name, " ".join(text.replace("`", "").split()))
    return found


# --- types ------------------------------------------------------------------------------------------------------------


def _alternatives(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]


def _describe(kind: Any) -> str:
    """Say what a type takes; empty where no text can say it."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return "a name or text"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in _LISTS:
        items = _describe(inner[0]) if inner and not isinstance(inner[0], typing.TypeVar) else "text"
        return f"a list ({items} each)" if items else ""
    if origin in _MAPPINGS:
        return "a mapping"
    if _takes_text(kind):
        return f"text ({kind.__name__})"
    return _WORDS.get(kind, "")


def _convert(value: Any, hint: Any) -> Any:
    """Bring a value to a type.

    Raises:
        ValueError: it cannot be one.
    """
    kinds = _alternatives(hint)
    if value is None and (type(None) in kinds or Any in kinds):
        return None
    for kind in sorted(kinds, key=_breadth):
        try:
            return _convert_one(value, kind)
        except ValueError:
            continue
    raise ValueError(value)


def _breadth(kind: Any) -> int:
    """What few texts could be is tried first, what any text could be last."""
    if kind in (str, Any, Path):
        return 2
    return int((typing.get_origin(kind) or kind) in _LISTS or _takes_text(kind))


def _convert_one(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return _only(value in inner, value)
    if origin in _LISTS:
        return _listed(value, inner)
    if origin in _MAPPINGS:
        return _only(isinstance(loaded := _json(value), dict), loaded)
    if kind is bool:
        text = str(value).lower()
        return _only(text in YES + NO, text in YES)
    if kind in (int, float):
        number = _only(isinstance(value, (int, float, str)) and not isinstance(value, bool), value)
        return kind(number) if isinstance(number, str) or kind is float else _only(isinstance(number, int), number)
    if _takes_text(kind):
        return kind(_only(isinstance(value, str), value))
    text = _only(kind in (str, Path) and isinstance(value, str), value)
    return text if kind is str else Path(text)


def _listed(value: Any, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    """Read a list: one that was written as JSON, or the texts of an option that was repeated."""
    parts = _json(value)
    if not isinstance(parts, (list, tuple)):
        parts = [_only(isinstance(value, str), value)]
    kinds: Iterable[Any] = [inner[0] if inner else Any] * len(parts)
    if len(inner) > 1 and inner[-1] is not Ellipsis:
        kinds = _only(len(inner) == len(parts), inner)
    return tuple(_convert(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _only(fits: bool, value: Any) -> Any:
    if not fits:
        raise ValueError(value)
    return value


def _takes_text(kind: Any) -> bool:
    """Whether a type of softhooks' own is made from one text."""
    return inspect.isclass(kind) and kind.__module__.startswith("softhooks.") and kind is not _OnlyInPython
