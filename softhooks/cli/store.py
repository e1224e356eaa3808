"""The commands `softhooks store list`, `add`, `tag`, `untag` and `remove`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.prompt_names import default_name
from softhooks.cli.visible import visible
from softhooks.errors import CheckpointError, NotAttachedError, OptionError

store = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of the store.", show_default=False)]
Name = Annotated[str, typer.Argument(help="The name of a prompt in the store.", show_default=False)]
Tags = Annotated[list[str], typer.Argument(help="One or more tags.", show_default=False)]


@store.callback()
def _about() -> None:
    """List and change a store: a folder with the prompts of one base model, which servers load by name.

    Each prompt is a subfolder. **softhooks.PromptStore** is the same in Python.
    """


@store.command("list")
def list_prompts(
    folder: Folder,
    tag: Annotated[str | None, typer.Option(help="List only the prompts with this tag.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with one object for each prompt.")] = False,
) -> None:
    """Show the prompts of a store with their methods, lengths, tags and base model. No model is needed.

    Exit status: 0 on success; 1 if a prompt is damaged; 2 if the folder is not a store.

    **Examples**

        softhooks store list prompts
        softhooks store list prompts --tag production --json
    """
    found = _facts(folder, tag)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found, Console() if sys.stdout.isatty() else Console(width=200, no_color=True))
    if any(one["damaged"] for one in found):
        raise typer.Exit(1)


@store.command()
def add(
    folder: Folder,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="A directory with a saved prompt, or a repository on the Hub.")
    ],
    name: Annotated[
        str | None,
        typer.Option(help="The name in the store. [default: the last part of PROMPT]", show_default=False),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="A tag; repeat the option for more.", show_default=False)
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a prompt with this name, and its tags.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The revision of the repository on the Hub.", show_default=False)
    ] = None,
    collection: Annotated[
        bool, typer.Option("--collection", help="PROMPT is a collection on the Hub: add all prompts in it.")
    ] = False,
) -> None:
    """Copy a saved prompt into a store; the first prompt creates the store.

    A prompt of another base model than those in the store is refused.

    **Examples**

        softhooks store add prompts sst2-prompt
        softhooks store add prompts runs/checkpoint-500 --name sst2 --tag candidate
        softhooks store add prompts me/prompts-64f9a55bb3115b4f513ec026 --collection
    """
    from softhooks.errors import NameTakenError, OptionError

    with usage_errors(), usage_errors(NameTakenError):
        if collection:
            if name is not None or revision is not None:
                raise OptionError("`--name` and `--revision` are for one prompt; a collection has several.")
            added = _open(folder).add_collection(prompt, tags=tag or (), replace=replace)
            typer.echo("\n".join(f"{one} -> {folder / one}" for one in added))
            return
        chosen = default_name(prompt) if name is None else name
        _open(folder).add(prompt, chosen, tags=tag or (), replace=replace, revision=revision)
    typer.echo(f"{chosen} -> {folder / chosen}")


@store.command("tag")
def add_tags(folder: Folder, name: Name, tags: Tags) -> None:
    """Add tags to a prompt.

    **Example**

        softhooks store tag prompts sst2 production
    """
    _change_tags(folder, name, lambda opened: opened.tag(name, *tags))


@store.command("untag")
def remove_tags(folder: Folder, name: Name, tags: Tags) -> None:
    """Remove tags from a prompt.

    **Example**

        softhooks store untag prompts sst2 candidate
    """
    _change_tags(folder, name, lambda opened: opened.untag(name, *tags))


@store.command()
def remove(folder: Folder, name: Name) -> None:
    """Delete a prompt and its tags from a store. Servers that have loaded it keep it until they unload it.

    **Example**

        softhooks store remove prompts sst2
    """
    with usage_errors(), usage_errors(NotAttachedError):
        _open(folder).remove(name)
    typer.echo(f"{name} removed from {folder}")


def _change_tags(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change the tags of a prompt in a store, and print them."""
    with usage_errors(), usage_errors(NotAttachedError):
        opened = _open(folder)
        change(opened)
    typer.echo(f"{name}: {', '.join(opened.tags(name)) or 'no tags'}")


def _open(folder: Path) -> Any:
    from softhooks.serving.prompt_store import PromptStore  # torch and transformers take seconds to import

    return PromptStore(folder)


def _facts(folder: Path, tag: str | None) -> list[dict[str, Any]]:
    """Describe each prompt of a store; `damaged` is None, or why the prompt cannot be read."""
    from softhooks.formats.find import read

    with usage_errors():
        opened = _open(folder)
        if not folder.is_dir():
            raise OptionError(f"there is no store at {folder}; `softhooks store add` creates one.")
    found: list[dict[str, Any]] = []
    for name in opened.names():
        facts: dict[str, Any] = {"name": name, "damaged": None}
        try:
            facts["tags"] = opened.tags(name)
            stored = read(opened.path(name))
            facts |= {"method": stored.kind, "num_virtual_tokens": stored.options.get("num_virtual_tokens")}
            facts |= {"base": stored.base.name_or_path or None, "base_class": stored.base.class_name or None}
        except CheckpointError as error:
            facts["damaged"] = str(error)
        if tag is None or tag in facts.get("tags", ()):
            found.append(facts)
    return found


def _show(found: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for title in ("name", "method", "virtual tokens", "tags", "base"):
        table.add_column(title, overflow="fold", justify="right" if title == "virtual tokens" else "left")
    for one in found:
        damaged = one["damaged"]
        row = [
            one["name"],
            *("" if one.get(key) is None else str(one[key]) for key in ("method", "num_virtual_tokens")),
        ]
        row += [", ".join(one.get("tags", ())), str(one.get("base") or one.get("base_class") or "")]
        if damaged:
            row = [one["name"], "damaged", "", ", ".join(one.get("tags", ())), damaged.splitlines()[0]]
        table.add_row(*(Text(visible(text)) for text in row))
    with console.capture() as printed:
        console.print(table if found else Text("no prompts"))
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))
