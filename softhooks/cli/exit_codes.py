"""Exit codes of the commands: 1 for a failure and 2 for an invalid command line, as with argparse and click."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from softhooks.cli.visible import visible
from softhooks.errors import OptionError, SoftHooksError

FAILURE, USAGE = 1, 2
_STATUS = "_softhooks_exit_status"


@contextmanager
def usage_errors(kind: type[SoftHooksError] = OptionError) -> Iterator[None]:
    """Make `report_errors` exit with code 2 if the `with` block raises an error of type `kind`."""
    try:
        yield
    except kind as error:
        setattr(error, _STATUS, USAGE)
        raise


@contextmanager
def report_errors() -> Iterator[None]:
    """Print errors of softhooks without a traceback, and exit."""
    try:
        yield
    except SoftHooksError as error:
        message = visible(f"{type(error).__name__}: {error}", kept="\n")  # the message may quote an untrusted file
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        sys.exit(getattr(error, _STATUS, FAILURE))
