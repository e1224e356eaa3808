"""`softhooks run script.py ARGS`, `softhooks run -m module ARGS`: an unchanged Trainer script trains a soft prompt.

A callback joins those that every Trainer gets by default; then the script or the module runs as Python would run it.
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

from softhooks.cli.exit_codes import usage
from softhooks.cli.run_arguments import Request, parse
from softhooks.compat.bitsandbytes import needs_admission
from softhooks.errors import OptionError, TrainerError
from softhooks.trainer.callback import SoftPromptCallback


def run(arguments: list[str]) -> None:
    """Run what a command line asks for.

    Raises:
        OptionError: the command line or the configuration is wrong.
        TrainerError: the script trained nothing with a Trainer.
    """
    run_program(parse(arguments))


def run_program(request: Request) -> None:
    """Run a script or a module with a callback in each of its Trainers.

    Raises:
        TrainerError: the script trained nothing with a Trainer.
    """
    with _callbacks(request) as made, _as_program(request):
        if request.is_module:
            with usage():
                _require_module(str(request.script))
        _say(f"{request.script} trains {request.method}")
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
            f"`softhooks run` trains through a transformers Trainer; {request.script} ended without making one.\n"
            "Attach the prompt in its own loop with `softhooks.attach` or `softhooks.tune`."
        )
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # scripts leave that to the interpreter's end, where now and then gloo aborts


def _require_module(name: str) -> None:
    """Check that a module can be run, as `python -m` does.

    Raises:
        OptionError: it is not there, or is a package without `__main__`.
    """
    packages = ["", *accumulate(name.split("."), "{}.{}".format)]
    try:
        is_name = not name.endswith(".py") and all(map(str.isidentifier, name.split(".")))
        spec = find_spec(name) if is_name else None  # imports the packages around it
        is_package = spec is not None and spec.submodule_search_locations is not None
        can_run = spec is not None and (not is_package or find_spec(f"{name}.__main__") is not None)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name not in packages:
            raise  # the package itself misses something
        spec, can_run = None, False
    if not can_run:
        raise OptionError(
            "`softhooks run -m` runs a module that `python -m` would run here.",
            "Name it with dots and without `.py`, and run the command where it can be imported.",
            module=repr(name),
            found="a package without `__main__`" if spec is not None else "no such module",
            looked_in=f"{sys.path[0]} and where Python is installed",
        )


@contextmanager
def _callbacks(request: Request) -> Iterator[list[SoftPromptCallback]]:
    """Give every Trainer that is made meanwhile a callback of its own; collect them."""
    made: list[SoftPromptCallback] = []

    class Given(SoftPromptCallback):
        """The callback that `softhooks run` gives to each Trainer."""

        remedy: ClassVar[str] = (
            "The script brings a SoftPromptCallback of its own: run it with `python`, or take the callback out."
        )

        def __init__(self) -> None:
            super().__init__(request.method, **request.callback)
            made.append(self)

    original = transformers.Trainer.__init__

    @functools.wraps(original)
    def with_prompt(trainer: transformers.Trainer, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if needs_admission(model):  # the Trainer asks before its callbacks are made
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
    """Show the script the `sys.argv` and `sys.path` that it would have alone."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["-m" if request.is_module else str(request.script), *request.arguments]
    sys.path[0] = str(Path.cwd()) if request.is_module else str(Path(request.script).resolve().parent)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(f"softhooks run: {text}", markup=False, highlight=False, soft_wrap=True)
