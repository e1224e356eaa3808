"""Examine a model in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import warnings
from multiprocessing.connection import Connection

import torch

from tests.survey import checks
from tests.survey.findings import KINDS, Case, examine

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.survey.findings"])


def examine_apart(case: Case, seconds: int) -> dict[str, str]:
    """Examine a model in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _context.Process(target=_examine, args=(case, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"model": f"not run: no answer within {seconds} s"}
    except EOFError:
        return {"model": "not run: its process died"}
    finally:
        process.kill()
        process.join()


def _examine(case: Case, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        model = case.build()
        checks.answer(model, checks.text_for(model, case.task, case.brings).call())
    except Exception as error:  # noqa: BLE001 - the tiny config does not suit the model, or it does not run on ids alone
        answer.send(dict.fromkeys(KINDS, f"not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"))
        return
    try:
        answer.send({kind: str(finding) for kind, finding in examine(case).items()})
    except Exception as error:  # noqa: BLE001 - whatever is raised here is a finding
        answer.send(dict.fromkeys(KINDS, f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:400]}"))
