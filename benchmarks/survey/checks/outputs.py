"""The prompt changes the output, but neither its shape nor what it says of which row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import softhooks
from benchmarks.survey.check import ROUNDING, Bare, Check, Subject
from benchmarks.survey.modality import answer, gap


def _effect(subject: Subject, _: Any) -> Iterator[str]:
    found = subject.answer()
    if found.shape == subject.bare.output.shape and gap(found, subject.bare.output) < 1e-4:
        yield "the prompt does not move the output"
    with softhooks.disabled(subject.model):
        if gap(subject.answer(), subject.bare.output) > 1e-5:
            yield "the output with `softhooks.disabled` is not that of the bare model"


def _shapes_of(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The shapes of everything that a forward returns, hidden states included; caches have none."""
    with torch.no_grad():
        output = model(**call, output_hidden_states=True)
    found: dict[str, Any] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = tuple(value.shape)
        elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
            found[name] = [tuple(part.shape) for part in value]
    return found


def _expected_shapes(bare: Bare) -> Any:
    return _shapes_of(bare.model, bare.example.call()) or None


def _shapes(subject: Subject, expected: dict[str, Any]) -> Iterator[str]:
    found = _shapes_of(subject.model, subject.example.call())
    for name in expected:
        if found.get(name) != expected[name]:
            yield f"{name} has the shape {found.get(name)} instead of {expected[name]}"


def _flipped(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.flip(0) if isinstance(value, Tensor) else value for name, value in call.items()}


def _ignores_order(bare: Bare) -> Any:
    found = answer(bare.model, _flipped(bare.example.call()))
    return True if gap(found.flip(0), bare.output) <= ROUNDING else None


def _order(subject: Subject, _: Any) -> Iterator[str]:
    moved = gap(answer(subject.model, _flipped(subject.example.call())).flip(0), subject.answer())
    if moved > ROUNDING:
        yield f"the order of rows moves the output by {moved:.1g}"


CHECKS = (
    Check("effect", "the prompt changes the output; `softhooks.disabled` restores the bare model's", _effect),
    Check("shapes", "logits and hidden states have the shapes of the bare model", _shapes, _expected_shapes),
    Check("row order", "the order of rows does not change a row's output", _order, _ignores_order),
)
