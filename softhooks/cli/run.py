"""`softhooks run`: run an unmodified Trainer script or module so that it trains a soft prompt.

A `SoftPromptCallback` is added to the default callbacks of every Trainer; then the script or module runs as it would under
`python`.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import transformers
from rich.console import Console
from torch import distributed
from transformers.trainer import DEFAULT_CALLBACKS

from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.run_parser import CommandLine
from softhooks.compat.bitsandbytes import is_purely_quantized
from softhooks.errors import OptionError, TrainerError
from softhooks.method import Method
from softhooks.trainer.callback import SoftPromptCallback


def run(line: CommandLine, method: Method, options: Mapping[str, Any]) -> None:
    """Run the script or module, adding a callback with these options to each of its Trainers."""
    script, *arguments = line.program
    with _callbacks(method, options) as made, _as_program(line):
        if line.is_module:
            with usage_errors():
                _require_module(script)
        _log(f"{script} trains {method}")
        try:
            if line.is_module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as left:
            if left.code not in (None, 0) or {"-h", "--help"} & set(arguments):
                raise
    if not made:
        raise TrainerError(
            f"{script} ended without creating a transformers Trainer, so `softhooks run` trained no prompt.",
            "In your own training loop, attach the prompt with `softhooks.attach` or `softhooks.tune`.",
        )
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # without this, gloo sometimes aborts when the interpreter exits


def _require_module(name: str) -> None:
    """Check that `python -m` can run a module."""
    packages = ["", *accumulate(name.split("."), "{}.{}".format)]
    try:
        is_name = not name.endswith(".py") and all(map(str.isidentifier, name.split(".")))
        spec = find_spec(name) if is_name else None  # imports the parent packages
        is_package = spec is not None and spec.submodule_search_locations is not None
        can_run = spec is not None and (not is_package or find_spec(f"{name}.__main__") is not None)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name not in packages:
            raise  # an import in a parent package failed
        spec, can_run = None, False
    if not can_run:
        raise OptionError(
            f"`softhooks run -m` cannot run {name!r}: {'it is a package without `__main__`' if spec else 'no such module'}.",
            "Write the module's name with dots and without `.py`, and run the command where Python can import the module.",
            looked_in=f"{sys.path[0]} and the installed packages",
        )


@contextmanager
def _callbacks(method: Method, options: Mapping[str, Any]) -> Iterator[list[SoftPromptCallback]]:
    """Add a callback to each Trainer that the `with` block creates, and yield the list of these callbacks."""
    made: list[SoftPromptCallback] = []

    class Given(SoftPromptCallback):
        """The callback that `softhooks run` adds to each Trainer."""

        remedy: ClassVar[str] = (
            "The script adds its own SoftPromptCallback: run it with `python`, or remove that callback."
        )

        def __init__(self) -> None:
            super().__init__(method, **options)
            made.append(self)

    original = transformers.Trainer.__init__

    @functools.wraps(original)
    def with_prompt(trainer: transformers.Trainer, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if is_purely_quantized(model):  # the Trainer refuses quantized models before it creates callbacks
            SoftPromptCallback(method, **options, model=model)
        original(trainer, model, *args, **kwargs)

    callbacks: list[type[transformers.TrainerCallback]] = DEFAULT_CALLBACKS  # type: ignore[assignment]
    callbacks.append(Given)
    transformers.Trainer.__init__ = with_prompt  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        transformers.Trainer.__init__ = original  # type: ignore[method-assign]
        callbacks.remove(Given)


@contextmanager
def _as_program(line: CommandLine) -> Iterator[None]:
    """Set `sys.argv` and `sys.path` to the values that the script or module would see under `python`."""
    script, *arguments = line.program
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["-m" if line.is_module else script, *arguments]
    sys.path[0] = str(Path.cwd() if line.is_module else Path(script).resolve().parent)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _log(text: str) -> None:
    """Print a line to stderr, only in the process of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(f"softhooks run: {text}", markup=False, highlight=False, soft_wrap=True)
