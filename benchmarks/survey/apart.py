"""Examine a model in a process of its own, forked from one that has imported everything, and end it when its time is over."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.survey.case import Case

Found = dict[str, Any]
"""The rows of a model by kind, as JSON; or only `not built` or `not finished`, with the reason."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.survey.warm"])


def examine_apart(case: Case, kinds: Sequence[str] | None, seconds: int) -> Found:
    """Examine a model in a process of its own."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_examine, args=(case, kinds, sender))
    process.start()
    sender.close()
    begun = time.monotonic()
    try:
        if not receiver.poll(seconds):
            return {"not finished": f"no answer within {seconds} s"}
        return receiver.recv() | {"seconds": round(time.monotonic() - begun, 1)}
    except EOFError:
        return {"not finished": "its process died"}
    finally:
        process.kill()
        process.join()


def _examine(case: Case, kinds: Sequence[str] | None, answer: Connection) -> None:
    from benchmarks.survey import warm  # noqa: F401 - is there already where the process was forked from one that has it
    from benchmarks.survey.case import NotBuiltError
    from benchmarks.survey.examine import examine

    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            found: Found = {kind: row.as_json() for kind, row in examine(case, kinds).items()}
        except NotBuiltError as error:
            found = {"not built": str(error)}
        except Exception as error:  # noqa: BLE001 - of the survey itself; the other models go on
            found = {"not finished": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    answer.send(found)
