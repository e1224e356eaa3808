"""The command `softhooks doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.cli.visible import visible


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model: a directory or a name on the Hub.", show_default=False),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Load the model itself, with its weights, instead of a tiny copy."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show versions, devices and attention kernels, and which prompts a model allows.

    With MODEL, a small prompt of each method is attached to a tiny copy of the model: the same class, with small sizes and
    random weights, made from the model's config. No weights are downloaded or loaded. The table shows how each method
    enters the model and what is refused with it. **--weights** attaches the prompts to the model itself, which also shows
    what depends on its weights, such as a quantization.

    Exit status: 0; or 1 if a package has a version that softhooks does not support, if the model cannot be examined, or if
    it allows no prompt.

    **Examples**

        softhooks doctor
        softhooks doctor Qwen/Qwen3-0.6B
        softhooks doctor models/my-model --weights --json
    """
    from softhooks.analysis import machine  # torch and transformers take seconds to import

    found: dict[str, Any] = {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "attention": machine.attention_kernels(),
        "model": None,
        "methods": None,
    }
    if model is not None:
        from softhooks.analysis.doctor import Candidate, try_methods

        candidate = Candidate(model)
        found["model"] = {**candidate.facts(), "examined": "the model itself" if weights else "a tiny copy"}
        found["methods"] = try_methods(candidate.real() if weights else candidate.tiny())
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console() if sys.stdout.isatty() else Console(width=160, no_color=True))
    is_supported = all(one["supported"] for one in found["versions"])
    if not is_supported or (found["methods"] is not None and all(one["error"] for one in found["methods"])):
        raise typer.Exit(1)


def show(found: dict[str, Any], console: Console) -> None:
    """Print the findings."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in [*_machine(found), *(_model(found["model"]) if found["model"] else ())]:
        facts.add_row(name, Text(visible(value)))
    console.print(facts)
    if found["methods"] is not None:
        console.print(_methods(found["methods"]), _legend(found["methods"]), _refusals(found["methods"]))


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    good = [f"{one['name']} {one['version']}" for one in found["versions"] if one["supported"]]
    bad = [
        f"{one['name']} {one['version'] or 'is not installed'}: softhooks needs {one['needs']}"
        for one in found["versions"]
        if not one["supported"]
    ]
    can = [name for name, runs in found["attention"].items() if runs]
    cannot = [name for name, runs in found["attention"].items() if not runs]
    return [
        ("versions", ", ".join(good)),
        *[("wrong" if not number else "", line) for number, line in enumerate(bad)],
        *[("devices" if not number else "", line) for number, line in enumerate(found["devices"])],
        ("attention", ", ".join(can) + (f"; not here: {', '.join(cannot)}" if cannot else "")),
    ]


def _model(model: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = [f"{model[name]:,} {name}" for name in ("layers", "parameters") if model[name] is not None]
    sizes += [f"{name} {model[name]:,}" for name in ("width", "vocabulary", "positions") if model[name] is not None]
    return [
        ("model", f"{model['name']}: {model['class']} ({model['model_type']})"),
        ("", ", ".join(sizes)),
        ("", f"attention: {', '.join(model['attention'])}"),
        ("examined", model["examined"]),
    ]


def _methods(methods: list[dict[str, Any]]) -> Table:
    table = _table("method", "enters this model as")
    for one in methods:
        if one["error"]:
            first = visible(one["error"].splitlines()[0])
            table.add_row(_name(one), Text.assemble(("refused", "red"), f": {first}"))
            continue
        needs = f"; each call needs {one['needs']}" if one["needs"] else ""
        table.add_row(_name(one), Text.assemble((one["injection"], "green"), needs))
    return table


def _legend(methods: list[dict[str, Any]]) -> Table:
    """Explain the ways in that occur."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for injection, text in {one["injection"]: one["way_in"] for one in methods if not one["error"]}.items():
        table.add_row(Text(injection, "green"), Text(text))
    return table


def _refusals(methods: list[dict[str, Any]]) -> Table:
    """Return a table of what is refused with a prompt, and with which methods."""
    tried = [_name(one) for one in methods if not one["error"]]
    found: dict[str, list[str]] = {}
    for one in methods:
        for line in one["refused"]:
            found.setdefault(line, []).append(_name(one))
    table = _table("refused", "with")
    for line, names in found.items():
        others = [name for name in tried if name not in names]
        shown = (
            ", ".join(names) if len(names) <= len(others) + 1 else ", ".join(others) and f"all but {', '.join(others)}"
        )
        table.add_row(Text(visible(line)), Text(shown or "all"))
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _name(one: dict[str, Any]) -> str:
    return str(one["method"]).replace("_", "-")
