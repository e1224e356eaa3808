"""Examine one model: try every kind of prompt, and make every check that applies."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import softhooks
from benchmarks.survey.case import Case, NotBuiltError, Row, one_line
from benchmarks.survey.check import Bare, Check, Subject, draw_anew, forget
from benchmarks.survey.checks import CHECKS
from benchmarks.survey.kinds import KINDS, Kind
from benchmarks.survey.modalities import MODALITY_OF, TASKS
from benchmarks.survey.modality import answer
from softhooks.errors import SoftHooksError, UnsupportedModeError

Facts = dict[Check, Any]


def examine(case: Case, kinds: Collection[str] | None = None) -> dict[str, Row]:
    """Try kinds of prompts on a model. -> the findings by the name of the kind.

    Args:
        kinds: the kinds to try; all that apply by default.

    Raises:
        NotBuiltError: there is no tiny model of the architecture, or it does not run by itself.
    """
    bare = _bare(case)
    facts = {check: check.facts(bare) for check in map(CHECKS.__getitem__, bare.modality.checks)}
    facts = {check: fact for check, fact in facts.items() if fact is not None}
    tried = [KINDS[name] for name in bare.modality.kinds if kinds is None or name in kinds]
    return {kind.name: _examine(bare, kind, facts) for kind in tried}


def _bare(case: Case) -> Bare:
    modality = MODALITY_OF[case.task]
    try:
        model = modality.build(case)
    except Exception as error:
        raise NotBuiltError(f"no tiny model: {type(error).__name__}: {one_line(error)}") from error
    try:
        example = modality.example(model, case)
        output = answer(model, example.call())
    except Exception as error:
        raise NotBuiltError(f"does not run by itself: {type(error).__name__}: {one_line(error)}") from error
    if not output.isfinite().all():
        raise NotBuiltError("does not run by itself: its output is not finite")
    task = TASKS[case.task]
    if task.output == "decoder" and not getattr(model.config, "is_encoder_decoder", False):
        task = replace(task, output="tokens")  # speech models of one stack are listed as seq2seq
    return Bare(case, task, modality, model, example, output)


def _examine(bare: Bare, kind: Kind, facts: Facts) -> Row:
    row, subject = Row(), Subject(bare, kind)
    try:
        subject.prompt = bare.modality.attach(bare.model, kind.make(), bare.example)
    except SoftHooksError as error:
        row.refusal = one_line(error, 1000)
    except Exception as error:  # noqa: BLE001 - attach must refuse with errors of its own
        row.wrong["attach"] = f"{type(error).__name__}: {one_line(error)}"
    if subject.prompt is not None:
        with subject.prompt as prompt:
            row.injection = prompt.injection
            _run(row, subject, facts, "fresh")
            draw_anew(prompt)
            _run(row, subject, facts, "attached")
    _run(row, subject, facts, "removed")
    return row


def _run(row: Row, subject: Subject, facts: Facts, phase: str) -> None:
    for check, fact in facts.items():
        if check.phase != phase or (check.kinds and subject.kind.name not in check.kinds):
            continue
        try:
            problems = _problems(check, subject, fact)
            ask_again = problems and check.asks_again and phase == "attached"
            if ask_again and (now := _facts_now(check, subject)) != fact:
                problems = [] if now is None else _problems(check, subject, now)
        except UnsupportedModeError as error:
            row.unsupported[check.name] = one_line(error)
            continue
        row.checked.append(check.name)
        if problems:
            row.wrong[check.name] = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if problems[3:] else "")


def _problems(check: Check, subject: Subject, fact: Any) -> list[str]:
    """The sentences of a check; also the error that it raises, unless the call is refused by name."""
    forget(subject.model)
    try:
        return list(check.run(subject, fact))
    except UnsupportedModeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is raised here is a finding
        return [f"{type(error).__name__}: {one_line(error)}"]


def _facts_now(check: Check, subject: Subject) -> Any:
    """Ask the bare model again."""
    with softhooks.disabled(subject.model):
        return check.facts(subject.bare)
