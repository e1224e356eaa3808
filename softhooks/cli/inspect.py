"""The command `softhooks inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softhooks.cli.prompt_table import show
from softhooks.cli.visible import visible
from softhooks.errors import format_message

WORDS = 5
"""The nearest words of each virtual token, by default."""


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH", help="Directories of saved prompts, written by save_pretrained, a Trainer or PEFT."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with one object for each PATH.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with plots to this file.", dir_okay=False, show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The base model, a directory or a name on the Hub: show the nearest words, and the attention to the prompt.",
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            min=1,
            help="Nearest words for each virtual token; only with --model. [default: 5]",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The text on which attention is measured; only with --model. [default: an English sentence]",
            show_default=False,
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The prompt before training, or an earlier checkpoint, to show how far the virtual tokens have moved. "
            "[default: the directory initial, which softhooks train writes]",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict", help="Refuse a base model whose weights differ from those used in training."
        ),
    ] = True,
) -> None:
    """Show the method, the base model, the tensors and the virtual tokens of a saved prompt. No model is needed.

    The command reads JSON and safetensors files, never pickles, and checks them as **softhooks.load** does. To check
    that a prompt fits a model, load it onto the model. For a PEFT adapter, the command shows the method and options that
    softhooks.load would use.

    **norms of rows** are the smallest and the largest Euclidean norm of a tensor's rows; in most methods, a row is a
    virtual token. Norms far larger than those of word embeddings mean that training has diverged.

    **slots** are the virtual tokens: their norms, the two that are most similar (by cosine), and how far they have moved
    from their initial values, if these are known.

    With **--model**, each virtual token is shown with its nearest words, and each layer with the share of attention that
    the tokens of a text pay to the prompt. LLaMA-Adapters have gates instead, which need no model.

    **live** describes the file from which training resumes. It contains the MLP of a prefix, heads and other trained
    parameters; only a Trainer's checkpoint has this file.

    All paths are read before anything is printed. Exit status: 0 on success; 1 if a file is damaged or inconsistent;
    2 if a PATH contains no prompt.

    **Examples**

        softhooks inspect sst2-prompt
        softhooks inspect runs/checkpoint-500 runs/checkpoint-1000
        softhooks inspect sst2-prompt --model gpt2 --words 3 --html sst2.html
        softhooks inspect runs/checkpoint-1000 --initial runs/checkpoint-500
        softhooks inspect my-peft-adapter --json | jq '.[0].options'
    """
    for option, value in (("--words", words), ("--text", text)):
        if value is not None and model is None:
            raise typer.BadParameter(f"{option} needs the base model: give --model as well.", param_hint=option)
    require_prompts([*paths, *([] if initial is None else [initial])])
    from softhooks.cli.prompt_facts import Questions, facts_of  # torch takes seconds to import

    asked = Questions(initial, model, words or WORDS, text, strict, matrix=html is not None)
    facts = [facts_of(path, asked) for path in paths]
    if html is not None:
        from softhooks.analysis.page import write_page

        write_page(html, facts)
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


def require_prompts(paths: Iterable[Path]) -> None:
    """Exit with status 2 and a message if there is no saved prompt at a path."""
    for path in paths:
        problem = _problem(path)
        if problem is not None:
            Console(stderr=True).print(visible(problem, "\n"), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2)


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
