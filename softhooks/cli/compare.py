"""The command `softhooks compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.cli.inspect import require_prompts
from softhooks.cli.visible import visible

_MOST = 24


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The directory of a saved prompt.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The directory of another saved prompt.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two saved prompts: settings, base models, and virtual tokens. No model is needed.

    The table of virtual tokens has their norms in both prompts, the cosine similarity and the distance of those in the same
    place, and the virtual token of B that is most similar to each virtual token of A. Only similarities within one base
    model mean something; whether the base models are the same is shown by a few values of each weight, which are saved
    with a prompt.

    Exit status: 0, also if the prompts differ; 1 if a file is damaged; 2 if there is no prompt at a path.

    **Examples**

        softhooks compare sst2-prompt imdb-prompt
        softhooks compare run/checkpoints/checkpoint-100 run --json
    """
    require_prompts([a, b])
    from softhooks.analysis.comparison import compare_prompts  # torch takes seconds to import
    from softhooks.formats.find import read

    found = {"a": str(a), "b": str(b), **compare_prompts(read(a), read(b))}
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    show(found, Console() if sys.stdout.isatty() else Console(width=200, no_color=True))


def show(found: dict[str, Any], console: Console) -> None:
    """Print a comparison."""
    console.print(Text(f"A: {visible(found['a'])}\nB: {visible(found['b'])}"), soft_wrap=True)
    console.print(Text.assemble("base models: ", (visible(found["base"]["finding"]), "bold")), soft_wrap=True)
    console.print(_settings(found["settings"]) if found["settings"] else Text("settings: equal"))
    for tensor in found["tensors"]:
        name = visible(tensor["name"])
        if tensor["rows"] is None:
            shapes = " and ".join(
                "none" if shape is None else " x ".join(map(str, shape)) for shape in tensor["shapes"]
            )
            console.print(Text(f"{name}: not comparable, the shapes are {shapes}"), soft_wrap=True)
        elif tensor["equal"]:
            console.print(Text(f"{name}: equal"), soft_wrap=True)
        else:
            console.print(_rows(name, tensor["rows"]), *_rest(tensor))
    for head in found["heads"]:
        gap = head["difference"]
        text = "not comparable" if gap is None else "equal" if gap == 0 else f"differs by at most {float(gap):.4g}"
        console.print(Text(f"head {visible(head['path'])}: {text}"), soft_wrap=True)


def _settings(settings: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for title in ("setting", "A", "B"):
        table.add_column(title, overflow="fold")
    for one in settings:
        table.add_row(*(Text(visible(text)) for text in (one["name"], _short(one["a"]), _short(one["b"]))))
    return table


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _rows(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan", title=name, title_justify="left")
    for title in ("slot", "norm in A", "norm in B", "cosine", "distance"):
        table.add_column(title, justify="right")
    table.add_column("most similar in B")
    for number, row in enumerate(rows[:_MOST]):
        near = row["most_similar"]
        values = [*row["norms"], row["cosine"], row["distance"]]
        shown = [f"{float(value):.4g}" for value in values]
        table.add_row(str(number), *shown, f"{near['slot']} ({float(near['cosine']):.2f})")
    return table


def _rest(tensor: dict[str, Any]) -> list[Text]:
    lines = []
    if len(tensor["rows"]) > _MOST:
        lines.append(f"and {len(tensor['rows']) - _MOST} more rows; --json shows all")
    (one, _), (other, _) = tensor["shapes"]
    if one != other:
        lines.append(f"A has {one} rows, B has {other}")
    return list(map(Text, lines))
