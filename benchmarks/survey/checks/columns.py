"""Padding does not matter, and no token sees a later one where the bare model is causal."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

import softhooks
from benchmarks.survey.check import ROUNDING, Bare, Check, Subject, padding_gap
from benchmarks.survey.modalities.text import Text
from benchmarks.survey.modality import answer, gap
from benchmarks.survey.tiny import pad_id
from softhooks.errors import UnsupportedModeError


def _padding(subject: Subject, _: Any) -> Iterator[str]:
    """Not on the left where the bare model pools the first column, or makes decoder ids of the text's (BART's classifier)."""
    structure, task = subject.structure, subject.bare.task
    pools_first = task.output == "pooled" and not structure.entry.causal
    copies_text = structure.is_encoder_decoder and task.output != "decoder"
    refused: UnsupportedModeError | None = None
    for side in ("right",) if pools_first or copies_text else ("left", "right"):
        try:
            if (moved := padding_gap(subject.model, subject.example, side)) > ROUNDING:
                yield f"padding on the {side} moves the output by {moved:.1g}"
            elif "position_ids" in inspect.signature(subject.model.forward).parameters:
                yield from _with_positions(subject, side)
        except UnsupportedModeError as error:
            refused = error
    if refused:
        raise refused


def _with_positions(subject: Subject, side: str) -> Iterator[str]:
    """Compare with the same call that brings `position_ids`, if they change nothing in the bare model without padding."""
    model, start = subject.model, subject.structure.entry.positions.start
    with softhooks.disabled(model):
        plain = subject.example.call()
        try:
            unchanged = gap(answer(model, _numbered(plain, start)), answer(model, plain)) <= ROUNDING
        except Exception:  # noqa: BLE001 - it takes none of this shape
            unchanged = False
    if not unchanged:
        return
    call, places = subject.example.ragged(side, pad_id(model))
    without, given = answer(model, call), answer(model, _numbered(call, start))
    for row, place in enumerate(places):
        columns = place if without.dim() == 3 and without.shape[1] == call["input_ids"].shape[1] else slice(None)
        if (moved := gap(given[row, columns], without[row, columns])) > ROUNDING:
            yield f"`position_ids` move the output by {moved:.1g} (padding on the {side})"
            return


def _numbered(call: dict[str, Any], start: int) -> dict[str, Any]:
    return call | {"position_ids": (call["attention_mask"].cumsum(-1) - 1).clamp(min=0) + start}


def _moved(model: Any, text: Text) -> tuple[float, float]:
    """How far the last word moves what stands before it, and its own output."""
    other = text.ids.clone()
    other[:, -1] = torch.where(other[:, -1] == 50, 51, 50)
    found, expected = answer(model, text.call(other)), answer(model, text.call())
    moved = (found - expected).abs().amax((0, 2)) / expected.abs().max().clamp(min=1e-6)
    return float(moved[:-1].max()), float(moved[-1])


def _earlier(bare: Bare) -> Any:
    return _moved(bare.model, bare.example)[0] if bare.task.output == "tokens" else None


def _causality(subject: Subject, bare: float) -> Iterator[str]:
    earlier, own = _moved(subject.model, subject.example)
    if bare == 0 and earlier > 1e-6:
        yield f"an earlier token moves by {earlier:.1g} with a later one"
    if bare > 1e-3 and earlier < 1e-6:
        yield "an earlier token no longer sees a later one"
    if own < 1e-6:
        yield "the last token's output does not depend on it"


CHECKS = (
    Check(
        "padding",
        "side and amount of padding do not change a row's output, with and without `position_ids`",
        _padding,
        lambda bare: True if bare.heeds_masks else None,
    ),
    Check("causality", "a token sees later tokens only where it does in the bare model", _causality, _earlier),
)
