"""The command `softhooks inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softhooks.cli.prompt_table import show, visible
from softhooks.errors import format_message


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH", help="Directories of saved prompts, written by save_pretrained, a Trainer or PEFT."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with one object for each PATH.")] = False,
) -> None:
    """Show the method, the base model and the tensors of a saved prompt. No model is needed.

    The command reads JSON and safetensors files, never pickles, and checks them as **softhooks.load** does. To check
    that a prompt fits a model, load it onto the model. For a PEFT adapter, the command shows the method and options that
    softhooks.load would use.

    **norms of rows** are the smallest and the largest Euclidean norm of a tensor's rows; in most methods, a row is a
    virtual token. Norms far larger than those of word embeddings mean that training has diverged.

    **live** describes the file from which training resumes. It contains the MLP of a prefix, heads and other trained
    parameters; only a Trainer's checkpoint has this file.

    All paths are read before anything is printed. Exit status: 0 on success; 1 if a file is damaged or inconsistent;
    2 if a PATH contains no prompt.

    **Examples**

        softhooks inspect sst2-prompt
        softhooks inspect runs/checkpoint-500 runs/checkpoint-1000
        softhooks inspect my-peft-adapter --json | jq '.[0].options'
    """
    for path in paths:
        problem = _problem(path)
        if problem is not None:
            Console(stderr=True).print(visible(problem, "\n"), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2)
    from softhooks.cli.prompt_facts import facts_of  # torch takes seconds to import

    facts = [facts_of(path) for path in paths]
    if as_json:
        typer.echo(json.dumps(facts, indent=2, allow_nan=False))
        return
    if sys.stdout.isatty():
        show(facts, Console())
        return
    plain = Console(width=100_000, force_terminal=False)  # do not wrap lines in a pipe
    with plain.capture() as printed:
        show(facts, plain)
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _problem(path: Path) -> str | None:
    """Describe why a path is not the directory of a saved prompt; return None if it is."""
    from softhooks.formats.find import MARKS, format_of

    try:
        if format_of(path) is not None:
            return None
        if path.is_dir():
            inside = sorted(str(entry) for entry in path.iterdir() if format_of(entry) is not None)
            found = f"prompts in {', '.join(inside)}" if inside else "a directory without a prompt in it"
        else:
            found = "a file" if path.exists() else "nothing"
    except OSError as error:  # the name is too long, or the directory is not readable
        found = str(error)
    return format_message(
        "there is no saved prompt at this path.",
        "Give a directory written by `save_pretrained`, a Trainer or PEFT; prompts on the Hub are not read.",
        path=path,
        expected=f"a directory with {' or '.join(MARKS.values())}",
        found=found,
    )
