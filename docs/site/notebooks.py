"""Write the notebooks of examples/notebooks from the scripts that have cells: `python docs/site/notebooks.py`.

A cell begins with a line `# %%`, or `# %% [markdown]` for text, as editors and jupytext read them. A test compares the files with
this script's output.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("cartridge", "few_shot_p_tuning", "text_classification")
_CELL = "\n# %%"
_ARGUMENTS = "parser.parse_args()"


def notebook(script: Path) -> str:
    """Return the text of the notebook of a script."""
    text = script.read_text(encoding="utf-8")
    title, *_ = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    _, *parts = text.split(_CELL)
    cells = [_cell(0, "markdown", f"# {title}")]
    for number, part in enumerate(parts, 1):
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(_cell(number, "markdown", "\n".join(lines)))
        else:
            cells.append(_cell(number, "code", body.strip().replace(_ARGUMENTS, f"{_ARGUMENTS[:-1]}[])")))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return {**cell, "execution_count": None, "outputs": []} if kind == "code" else cell


def notebooks() -> dict[str, str]:
    """Return the JSON of each notebook by its file name."""
    return {f"{name}.ipynb": notebook(EXAMPLES / f"{name}.py") for name in SCRIPTS}


if __name__ == "__main__":
    (EXAMPLES / "notebooks").mkdir(exist_ok=True)
    for name, text in notebooks().items():
        (EXAMPLES / "notebooks" / name).write_text(text, encoding="utf-8")
