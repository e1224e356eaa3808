"""The command `softhooks train`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.method_command import METHOD_OPTIONS, method_names
from softhooks.errors import OptionError
from softhooks.recipe.options import TrainOptions

DEFAULTS = TrainOptions(Path(), "", Path())


class Task(enum.Enum):
    """What is trained."""

    LANGUAGE_MODEL = "language-model"
    CLASSIFICATION = "classification"


class Precision(enum.Enum):
    """The dtype of the frozen weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="A table: .jsonl, .json, .csv, .tsv or .parquet.", exists=True, dir_okay=False
        ),
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="The base model: a directory or a name on the Hub.")],
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The method, such as prompt-tuning or prefix-tuning. [default: prompt-tuning]",
            autocompletion=method_names,
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        Task, typer.Option(metavar="TASK", help="`language-model`: write answers. `classification`: a new head.")
    ] = Task.LANGUAGE_MODEL,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="The column of the texts, or a format with columns in braces, such as '{premise} {hypothesis}'. "
            "[default: text, prompt, question, input or sentence]",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="The column of the labels or answers. [default: label, answer, completion, target or output]",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        str,
        typer.Option(
            metavar="SHARE|FILE",
            help="A share of the rows to measure the prompt on, or a table with other rows. 0: measure nothing.",
        ),
    ] = str(DEFAULTS.validation),
    output: Annotated[
        Path | None,
        typer.Option(
            help="A new directory for the prompt, the report and the checkpoints. [default: the name of DATA, and -prompt]",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float, typer.Option(metavar="NUMBER", min=0.01, help="How often each row is seen.")
    ] = DEFAULTS.epochs,
    max_steps: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", min=1, help="Stop after this many steps, whatever --epochs is.", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            min=0.0,
            help="The learning rate of AdamW. [default: 1e-2 for prompt tuning, 5e-3 for prefixes; see docs/methods.md]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Rows in a batch.")] = DEFAULTS.batch_size,
    max_length: Annotated[
        int, typer.Option(metavar="NUMBER", min=4, help="Longer rows are truncated to this many tokens.")
    ] = DEFAULTS.max_length,
    seed: Annotated[
        int, typer.Option(help="The seed for the split, the prompt and the order of rows.")
    ] = DEFAULTS.seed,
    precision: Annotated[
        Precision,
        typer.Option(
            metavar="DTYPE",
            help="The dtype of the frozen weights: float32, bfloat16 or float16; `auto` is bfloat16 on a GPU that "
            "supports it, else float32.",
        ),
    ] = Precision.AUTO,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output from its last checkpoint.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML or JSON file with the method and its options, as for `softhooks run`.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a soft prompt on a table of texts and answers, and save it with a report.

    The table has a text and a label (or an answer) in each row, or chats in a column `messages`, each a list of `role` and
    `content`. A plain Trainer trains the prompt; the model stays frozen, and nothing of it is saved.

    **language-model** (the default) trains the model to write the label or the answer after the text; a space separates
    them, unless the text ends with white space. In chats, it learns every message of the role `assistant`, after the
    chat template's prompt. The result is measured by the share of validation rows that greedy decoding would answer
    exactly. Encoder-decoders read the text in the encoder.

    **classification** trains a new head with the prompt, also on encoders, and measures accuracy.

    Checkpoints are written after each epoch, and the one with the lowest validation loss is kept. The optimizer is AdamW,
    with a linear schedule and 6% warm-up. All options of the methods and of the callback are accepted as by
    `softhooks run`, whose help describes them: `softhooks run --method NAME --help`. A method has 20 virtual tokens unless
    you say otherwise, and gets the model's tokenizer if it needs one.

    **Examples**

        softhooks train reviews.jsonl --model HuggingFaceTB/SmolLM2-360M
        softhooks train nli.csv --model gpt2 --text '{premise} {hypothesis} So:'
        softhooks train reviews.csv --model roberta-base --task classification
        softhooks train chats.jsonl --model Qwen/Qwen3-0.6B --method prefix-tuning
        softhooks train reviews.jsonl --model HuggingFaceTB/SmolLM2-360M --resume
    """
    with usage_errors():
        options = TrainOptions(
            data=data,
            model=model,
            output=output or Path(f"{data.stem}-prompt"),
            task=task.value,
            validation=_validation(validation),
            text=text,
            label=label,
            epochs=epochs,
            max_steps=max_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            precision=precision.value,
            resume=resume,
        )
    from softhooks.cli.run_arguments import resolve  # torch and transformers take seconds to import
    from softhooks.recipe.train import train as train_prompt

    with usage_errors():
        made, callback = resolve(method, config, context.meta[METHOD_OPTIONS], tokenizer=model)
        report = train_prompt(options, made, callback)
    report.show(Console())


def _validation(given: str) -> float | Path:
    """Read a share or the path of a file."""
    try:
        share = float(given)
    except ValueError:
        path = Path(given)
        if path.is_file():
            return path
        raise OptionError(
            f"--validation is {given!r}, which is neither a number nor a file.",
            "Give a share, such as 0.1, or a table.",
        ) from None
    if not 0.0 <= share < 1.0:
        raise OptionError(f"--validation is {given}; a share must be at least 0 and below 1.")
    return share
