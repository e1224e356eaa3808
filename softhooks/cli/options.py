"""Read the options of the methods and of the callback from their source code, because importing them would import torch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from softhooks.cli.definitions import Definition, find, imported
from softhooks.cli.option_types import alternatives, convert, describe, read_annotation
from softhooks.errors import OptionError


@dataclass(frozen=True)
class Option:
    """An option of a method or of the callback.

    Attributes:
        hint: the type.
        annotation: the type as Python code.
        default: the default as Python code, or None if there is no default.
        about: the description.
    """

    name: str
    hint: Any
    annotation: str
    default: str | None
    about: str

    @property
    def flag(self) -> str:
        """The option as written on the command line: `--num-virtual-tokens`."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the option is written as `--name` or `--no-name`, without a value."""
        return alternatives(self.hint) == [bool]

    @property
    def takes(self) -> str:
        """A description of the accepted values; empty if only Python code can create them."""
        return describe(self.hint)

    def read(self, value: Any) -> Any:
        """Convert a value from a file, or a string from a command line, to the type of the option.

        Raises:
            OptionError: the value is invalid, or only Python code can create valid values.
        """
        if not self.takes:
            raise OptionError(
                f"{self.flag} needs an object that only Python code can create.",
                "Leave the option out, or call `softhooks.attach` in the script.",
                type=self.annotation,
            )
        try:
            return convert(value, self.hint)
        except ValueError:
            remedy = "`softhooks run --method NAME --help` describes the options of a method."
            if self.is_switch:
                remedy = f"Write `{self.flag}`, or `--no-{self.flag[2:]}`."
            elif "list" in self.takes:
                remedy = "Write a list as [1, 2], or repeat the option."
            raise OptionError(f"{self.flag} cannot be {value!r}; it must be {self.takes}.", remedy) from None


@cache
def methods() -> dict[str, Definition]:
    """Map the `kind` of each method to its class, in the order of `softhooks.methods`."""
    kinds = {definition: _fields(definition).get("kind") for definition in imported("softhooks.methods")}
    return {ast.literal_eval(field.value): found for found, field in kinds.items() if field and field.value}


@cache
def method_options(kind: str) -> dict[str, Option]:
    """Return the options of a method, by name."""
    lineage = _lineage(methods()[kind])
    about = _about(*(_docstring(base) for base in lineage))
    options: dict[str, Option] = {}
    for base in reversed(lineage):
        for name, field in _fields(base).items():
            if not ast.unparse(field.annotation).startswith("ClassVar"):
                options[name] = _option(name, field.annotation, field.value, base.module, about)
    return options


@cache
def callback_options() -> dict[str, Option]:
    """Return the callback's options by name, without those whose values only Python code can create."""
    callback = _found("SoftPromptCallback", "softhooks.trainer.callback")
    init = next(node for node in _body(callback) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    about = _about(_docstring(callback), _docstring(_found("attach", "softhooks.attach")))
    options = {
        item.arg: _option(item.arg, item.annotation or ast.Name("Any"), default, callback.module, about)
        for item, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    }
    return {name: option for name, option in options.items() if option.takes}


def summary(kind: str) -> str:
    """Return the first paragraph of a method's docstring, without backticks."""
    return " ".join(_docstring(methods()[kind]).split("\n\n")[0].replace("`", "").split())


def _option(name: str, annotation: ast.expr, value: ast.expr | None, module: str, about: dict[str, str]) -> Option:
    """Read an option; `value` is its default, or a call to `field` with the default."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((item.value for item in value.keywords if item.arg == "default"), None)
    default = None if value is None else ast.unparse(value)
    if isinstance(value, ast.Constant) and str(value.value).strip():
        default = str(value.value)
    return Option(name, read_annotation(annotation, module), ast.unparse(annotation), default, about.get(name, ""))


def _found(name: str, module: str) -> Definition:
    found = find(name, module)
    assert found is not None
    return found


def _lineage(definition: Definition) -> list[Definition]:
    """Return a class and its base classes in softhooks."""
    bases = definition.node.bases if isinstance(definition.node, ast.ClassDef) else []
    found = [find(ast.unparse(base), definition.module) for base in bases]
    return [definition, *(base for parent in found if parent for base in _lineage(parent))]


def _body(definition: Definition) -> list[ast.stmt]:
    return definition.node.body if isinstance(definition.node, ast.ClassDef) else []


def _fields(definition: Definition) -> dict[str, ast.AnnAssign]:
    """Return the annotated attributes of a class by name."""
    nodes = [node for node in _body(definition) if isinstance(node, ast.AnnAssign)]
    return {node.target.id: node for node in nodes if isinstance(node.target, ast.Name)}


def _docstring(definition: Definition) -> str:
    node = definition.node
    return ast.get_docstring(node) or "" if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else ""


def _about(*docs: str) -> dict[str, str]:
    """Read the first description of each argument in the `Args` of docstrings, ignoring those that begin with "as in"."""
    found: dict[str, str] = {}
    for doc in docs:
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", doc, re.MULTILINE)
        for names, text in re.findall(
            r"^ {4}(\w[\w, ]*): ((?:.*\n?)(?: {8}.*\n?)*)", section[1] if section else "", re.M
        ):
            if not text.startswith("as in"):
                for name in names.split(", "):
                    found.setdefault(name, " ".join(text.replace("`", "").split()))
    return found
