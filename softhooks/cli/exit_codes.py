"""How a command ends: 0; 1 where what it was asked for failed; 2 where it was asked wrongly, as with argparse and click."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from softhooks.cli.prompt_table import visible
from softhooks.errors import OptionError, SoftHooksError

FAILURE, USAGE = 1, 2
_STATUS = "_softhooks_exit_status"


@contextmanager
def usage(kind: type[SoftHooksError] = OptionError) -> Iterator[None]:
    """Note on an error of this kind that it is one of whoever has called the command."""
    try:
        yield
    except kind as error:
        setattr(error, _STATUS, USAGE)
        raise


@contextmanager
def reported() -> Iterator[None]:
    """End the process with an expected error as one message, without a traceback."""
    try:
        yield
    except SoftHooksError as error:
        message = visible(f"{type(error).__name__}: {error}", kept="\n")  # a hostile file's words may be in it
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        sys.exit(getattr(error, _STATUS, FAILURE))
