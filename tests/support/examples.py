"""Run the example in the docstring of an integration as it stands.

An example is what a user would paste, at most fifteen lines of it. It may use names that the user has already (`model`,
`tokenizer`, `dataset`, ...); `given/<framework>.py` makes them, on a tiny model and without a network:

    python tests/support/examples.py trl

Also run from a built wheel in a fresh environment with nothing but that framework's extra (`make test-extras`).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "Example:"
LONGEST = 15


def example(docstring: str) -> str:
    """The indented block under the line `Example:` of a docstring."""
    lines = docstring.splitlines()
    if MARK not in lines:
        raise ValueError(f"the docstring has no line {MARK!r}")
    block: list[str] = []
    for line in lines[lines.index(MARK) + 1 :]:
        if line.strip() and not line.startswith(" "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block)).strip("\n")


def source_of(framework: str) -> str:
    """The example of `softhooks.integrations.<framework>`, read from its file: the framework is not imported for it."""
    found = importlib.util.find_spec(f"softhooks.integrations.{framework}")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"there is no module softhooks.integrations.{framework}")
    return example(ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or "")


def given(framework: str) -> dict[str, Any]:
    """The names that the example expects."""
    return dict(runpy.run_path(str(HERE / "given" / f"{framework}.py"))["names"]())


def run(framework: str) -> dict[str, Any]:
    """Run one example in an empty folder; return its names."""
    names, code = given(framework), compile(source_of(framework), f"<example of {framework}>", "exec")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(code, names)
        finally:
            os.chdir(before)
    return names


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    for name in sys.argv[1:]:
        run(name)
        print(f"the example of {name} ran")
