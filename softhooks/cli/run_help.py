"""The help of `softhooks run`: what it does, examples, and what every option of every method means."""

from __future__ import annotations

import shutil
import textwrap

from softhooks.cli.options import Option, callback_options, method_options, methods, summary
from softhooks.cli.run_parser import DEFAULT_METHOD, DEFAULT_TOKENS

_INTRODUCTION = """
Usage: softhooks run [--method METHOD] [OPTIONS] SCRIPT [ARGUMENTS OF THE SCRIPT]

  or:  softhooks run [--method METHOD] [OPTIONS] -m MODULE [ARGUMENTS OF THE MODULE]

Run a Trainer script, not a line of it changed, so that it trains a soft prompt. Every transformers Trainer that the script makes
(a Seq2SeqTrainer too) gets a SoftPromptCallback: the model is frozen, the prompt is all that trains, checkpoints and
save_model hold the prompt only, and at the end the frozen weights are proved unchanged. Use the saved prompt with
softhooks.load(model, directory).

Prompts want a far larger learning rate than weights: 1e-2 for prompt tuning, 5e-3 for a prefix. Give it to the script.

Examples:

  softhooks run train.py --learning_rate 1e-2 --output_dir sst2

  softhooks run --method prefix-tuning --num-virtual-tokens 16 train.py --learning_rate 5e-3

  softhooks run -m package.train --learning_rate 1e-2

  torchrun --nproc-per-node 2 -m softhooks run --config prompt.yaml train.py --learning_rate 1e-2

`accelerate launch -m softhooks run ...` works too. The exit status is the script's; 2 if this command line is wrong.

A configuration in YAML or JSON; the command line wins over it:

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
    """The help: an overview, or with one method's options in full."""
    lines = [*_wrapped(_INTRODUCTION), "Options:"]
    lines += _row("--method NAME", f"the method; {DEFAULT_METHOD} by default")
    lines += _row("--config FILE", "read the method and options from a YAML or JSON file")
    lines += _row("-m MODULE", "run a module as python -m does; what follows is passed on to it")
    lines += _row("--help", "show this help; with --method, what all options of that method mean")
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
        lines += ["", "`softhooks run --method NAME --help` explains the options of a method."]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    """Wrap paragraphs; indented ones stay as they are."""
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
