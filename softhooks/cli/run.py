"""`softhooks run`: run an unmodified Trainer script or module so that it trains a soft prompt.

A `SoftPromptCallback` is added to the default callbacks of every Trainer; then the script or module runs as under Python.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Iterator
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
from softhooks.cli.run_arguments import Request, parse
from softhooks.compat.bitsandbytes import is_purely_quantized
from softhooks.errors import OptionError, TrainerError
from softhooks.trainer.callback import SoftPromptCallback


def run(arguments: list[str]) -> None:
    """Run the script or module that a command line names, with a soft prompt.

    Raises:
        OptionError: the command line or the configuration is wrong.
        TrainerError: the script created no Trainer.
    """
    run_program(parse(arguments))


def run_program(request: Request) -> None:
    """Run a script or a module with a callback in each of its Trainers.

    Raises:
        TrainerError: the script created no Trainer.
    """
    with _callbacks(request) as made, _as_program(request):
        if request.is_module:
            with usage_errors():
                _require_module(str(request.script))
        _log(f"{request.script} trains {request.method}")
        try:
            if request.is_module:
                runpy.run_module(str(request.script), run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(request.script), run_name="__main__")
        except SystemExit as left:
            if left.code not in (None, 0) or {"-h", "--help"} & set(request.arguments):
                raise
    if not made:
        raise TrainerError(
            f"{request.script} ended without creating a transformers Trainer, so `softhooks run` trained no prompt.",
            "In your own training loop, attach the prompt with `softhooks.attach` or `softhooks.tune`.",
        )
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # without this, gloo sometimes aborts when the interpreter exits


def _require_module(name: str) -> None:
    """Check that `python -m` can run a module.

    Raises:
        OptionError: there is no such module, or it is a package without `__main__`.
    """
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
            "Give its name with dots and without `.py`, and run the command where the module can be imported.",
            looked_in=f"{sys.path[0]} and the installed packages",
        )


@contextmanager
def _callbacks(request: Request) -> Iterator[list[SoftPromptCallback]]:
    """Add a callback to every Trainer that is created in the `with` block, and yield the list of callbacks."""
    made: list[SoftPromptCallback] = []

    class Given(SoftPromptCallback):
        """The callback that `softhooks run` adds to each Trainer."""

        remedy: ClassVar[str] = (
            "The script adds its own SoftPromptCallback: run it with `python`, or remove that callback."
        )

        def __init__(self) -> None:
            super().__init__(request.method, **request.callback)
            made.append(self)

    original = transformers.Trainer.__init__

    @functools.wraps(original)
    def with_prompt(trainer: transformers.Trainer, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if is_purely_quantized(model):  # the Trainer refuses quantized models before it creates callbacks
            SoftPromptCallback(request.method, **request.callback, model=model)
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
def _as_program(request: Request) -> Iterator[None]:
    """Set `sys.argv` and `sys.path` to the values that the script or module would see under `python`."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["-m" if request.is_module else str(request.script), *request.arguments]
    sys.path[0] = str(Path.cwd()) if request.is_module else str(Path(request.script).resolve().parent)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _log(text: str) -> None:
    """Print a line to stderr, from one process only."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(f"softhooks run: {text}", markup=False, highlight=False, soft_wrap=True)
