"""A Sphinx extension: docstrings as they are written here, in Markdown, for Sphinx, which expects reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_LABEL = re.compile(r"^(Source|Versions tested): ")
_LETTER = re.compile(r"^( +\w+: [A-Za-z])\.$")
"""An argument that is described by a letter, such as `P.`, which would begin a list."""


def _convert(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make a code block of an example, set lists off from the text before them, and set the labels of paragraphs in bold."""
    converted: list[str] = []
    previous = ""
    for line in lines:
        if line == "Example:":
            line = "Example::"
        elif what == "module" and line.startswith("    ") and not previous and _is_code(converted):
            converted += ["::", ""]
        elif line.lstrip().startswith("- ") and previous and not _in_item(converted):
            converted.append("")
        converted.append(_LETTER.sub(r"\1\\.", _LABEL.sub(r"**\1:** ", line)))
        if line == "Example::":
            converted.append("")
        previous = line
    lines[:] = converted


def _is_code(lines: list[str]) -> bool:
    """Return whether an indented line after these lines begins a block of code, as in Markdown."""
    text = [line for line in lines if line.strip()]
    return bool(text) and not text[-1].startswith((" ", "- ")) and not text[-1].endswith("::")


def _in_item(lines: list[str]) -> bool:
    """Return whether the last lines belong to an item of a list."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if line.lstrip().startswith("- "):
            return True
    return False


def setup(app: Sphinx) -> dict[str, Any]:
    """Convert docstrings before napoleon splits them into sections; smaller priorities run first."""
    app.connect("autodoc-process-docstring", _convert, priority=100)
    return {"parallel_read_safe": True}
