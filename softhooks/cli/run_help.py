"""The help of `softhooks run`."""

from __future__ import annotations

import shutil
import textwrap

from softhooks.cli.options import Option, callback_options, method_options, methods, summary
from softhooks.cli.run_parser import DEFAULT_METHOD, DEFAULT_TOKENS

_INTRODUCTION = """
Usage: softhooks run [OPTIONS] SCRIPT [ARGUMENTS OF THE SCRIPT]

  or:  softhooks run [OPTIONS] -m MODULE [ARGUMENTS OF THE MODULE]

Run an unmodified Trainer script so that it trains a soft prompt. Every transformers Trainer that the script creates, \
including a Seq2SeqTrainer, gets a SoftPromptCallback: the model is frozen, only the prompt trains, checkpoints and \
save_model contain only the prompt, and after training the callback checks that the frozen weights are unchanged. Load the \
saved prompt with softhooks.load(model, directory).

Prompts need a far higher learning rate than weights: for example, 1e-2 for prompt tuning and 5e-3 for a prefix. Set it in \
the script or in its arguments.

Examples:

  softhooks run train.py --learning_rate 1e-2 --output_dir sst2

  softhooks run --method prefix-tuning train.py --learning_rate 5e-3

  softhooks run -m package.train --learning_rate 1e-2

  torchrun --nproc-per-node 2 -m softhooks run --config prompt.yaml train.py

`accelerate launch -m softhooks run ...` works too. The exit status is that of the script, or 2 if the command line is wrong.

Example of a configuration file (YAML or JSON); options on the command line take precedence:

  method: prompt_tuning
  options:
    num_virtual_tokens: 20
    init: text
    init_text: "Is this review positive or negative?"
    tokenizer: distilbert-base-uncased
  callback:
    trainable: ["*norm*"]
"""


def help_text(kind: str | None = None) -> str:
    """Return the help, with the options of the method `kind` or with an overview of all methods."""
    lines = [*_wrapped(_INTRODUCTION), "Options:"]
    lines += _row("--method NAME", f"the method; {DEFAULT_METHOD} by default")
    lines += _row("--config FILE", "a YAML or JSON file with the method and its options")
    lines += _row("-m MODULE", "run a module, like python -m; everything after MODULE is passed to it")
    lines += _row("--help", "show this help; with --method, describe all options of that method")
    lines += ["", "Options of the callback:"]
    for option in callback_options().values():
        lines += _option(option)
    for name in methods() if kind is None else [kind]:
        lines += ["", *textwrap.wrap(f"{name.replace('_', '-')}: {summary(name)}", _width())]
        if kind is None:
            flags = " ".join(option.flag for option in method_options(name).values() if option.takes)
            lines += textwrap.wrap(flags, _width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            continue
        for option in method_options(name).values():
            lines += _option(option)
    if kind is None:
        lines += ["", "`softhooks run --method NAME --help` describes the options of a method."]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    """Wrap the paragraphs that are not indented."""
    found: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        indented = paragraph.startswith(" ")
        found += [*(paragraph.split("\n") if indented else textwrap.wrap(paragraph, _width())), ""]
    return found


def _option(option: Option) -> list[str]:
    flags = f"{option.flag} ({option.takes or 'only in Python'})"
    if option.is_switch:
        flags = f"{option.flag}, --no-{option.flag[2:]}"
    default = str(DEFAULT_TOKENS) if (option.name, option.default) == ("num_virtual_tokens", None) else option.default
    return _row(flags, option.about.rstrip(".") + ("" if default in (None, "None", "()") else f" [{default}]"))


def _row(left: str, right: str) -> list[str]:
    text = textwrap.wrap(right, _width(), initial_indent=" " * 30, subsequent_indent=" " * 30)
    if len(left) < 27 and text:
        return [f"  {left:<28}{text[0].lstrip()}", *text[1:]]
    return [f"  {left}", *text]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 110)
