"""`softhooks run script.py ARGS`: a Trainer script, not a line of it changed, trains a soft prompt.

A callback joins those that every Trainer gets by default; then the script runs as `python script.py ARGS` would run it.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import transformers
from rich.console import Console
from torch import distributed
from transformers.trainer import DEFAULT_CALLBACKS

from softhooks.command.request import Help, Request, parse
from softhooks.command.usage import explained
from softhooks.errors import TrainerError
from softhooks.quantised import needs_admission
from softhooks.trainer.callback import SoftPromptCallback


def run(arguments: list[str]) -> None:
    """Run what a command line asks for.

    Raises:
        OptionError: the command line or the configuration is wrong.
        TrainerError: the script trained nothing with a Trainer.
    """
    request = parse(arguments)
    if isinstance(request, Help):
        sys.stdout.write(explained(request.kind))
        return
    with _callbacks(request) as made, _as_program(request):
        _say(f"{request.script} trains {request.method}")
        try:
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
    sys.argv = [str(request.script), *request.arguments]
    sys.path[0] = str(request.script.resolve().parent)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(f"softhooks run: {text}", markup=False, highlight=False, soft_wrap=True)
