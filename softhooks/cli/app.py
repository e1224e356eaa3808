"""The commands of `softhooks`."""

from __future__ import annotations

import enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from softhooks.cli import run_parser
from softhooks.cli.compare import compare
from softhooks.cli.demo import demo
from softhooks.cli.doctor import doctor
from softhooks.cli.exit_codes import report_errors, usage_errors
from softhooks.cli.export import export
from softhooks.cli.inspect import inspect
from softhooks.cli.method_command import MethodCommand
from softhooks.cli.run_help import help_text
from softhooks.cli.store import store
from softhooks.cli.train import train
from softhooks.errors import CheckpointError

app = typer.Typer(
    name="softhooks",
    no_args_is_help=True,
    rich_markup_mode="markdown",
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Soft prompts for unmodified Hugging Face models and Trainers."""


def run(context: typer.Context) -> None:
    """Run an unmodified Trainer script, or a module (-m), with a soft prompt: softhooks run script.py ARGS."""
    with usage_errors():
        line = run_parser.read(context.args)
        if line.help:
            method = line.method or run_parser.read_config(line.config)["method"]
            typer.echo(help_text(method and run_parser.method_kind(method)), nl=False)
            return
    from softhooks.cli import run, run_arguments  # torch and transformers take seconds to import

    with usage_errors():
        method, callback = run_arguments.resolve_line(line)
    run.run(line, method, callback)


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A directory with one or several saved prompts.", exists=True, file_okay=False
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new directory. If the conversion fails, it is not created."),
    ],
    to: Annotated[
        Format | None,
        typer.Option(help="The format to write; by default, the one that IN is not in.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The directory of the base model. The prompt is loaded onto this model to check that it fits. Required "
            "for PEFT prompts that were trained on an encoder, have virtual tokens within the text, or use LLaMA-Adapter: "
            "their files do not describe the base model.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict", help="Refuse a base model whose weights differ from those used in training."
        ),
    ] = True,
) -> None:
    """Convert saved prompts from softhooks to PEFT, or from PEFT to softhooks.

    softhooks writes soft_prompt.safetensors and soft_prompt.json; PEFT writes adapter_model.safetensors and
    adapter_config.json. Both libraries compute the same logits for text without padding. If an LSTM or MLP computes the
    prompt, only its output is stored.

    A directory with several prompts is converted as a whole. As in PEFT, 'default' is at the top level, and every other
    prompt is in a subdirectory with its name. Prompts for which the other library would compute different logits are
    refused: prefixes of encoder-decoders, virtual tokens within the text, prompts in encoders whose head reads the
    first position, and prefixes in only some layers. Pickle files are not read.

    **softhooks.load** reads PEFT's directories directly, so a PEFT prompt can be used without a conversion.

    **Examples**

        softhooks convert sst2-prompt sst2-adapter
        softhooks convert my-peft-adapter my-prompt
        softhooks convert ner-adapter ner-prompt --base models/bert-base-cased
    """
    from softhooks.cli.convert import convert as convert_prompts  # torch and transformers take seconds to import
    from softhooks.cli.convert import prompts_in

    with usage_errors(CheckpointError):
        prompts_in(source)
    with usage_errors():
        converted = convert_prompts(source, target, None if to is None else to.value, base, strict)
    for name, stored in converted.items():
        where = target if name == "default" else target / name
        typer.echo(f"{name}: {stored.kind}, {stored.options['num_virtual_tokens']} virtual tokens -> {where}")


app.command(cls=MethodCommand)(train)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)(run)
app.command()(demo)
app.command()(inspect)
app.command()(compare)
app.command()(doctor)
app.command()(convert)
app.command()(export)
app.add_typer(store, name="store")


def main() -> None:
    """Run the command line."""
    with report_errors():
        app()


if __name__ == "__main__":
    main()
