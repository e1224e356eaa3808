"""A prompt of embeddings against the bare model on the prompt's rows and the text's embeddings, put together by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import softhooks
from benchmarks.survey.check import ROUNDING, Bare, Check, Subject
from benchmarks.survey.modalities.text import Text
from benchmarks.survey.modality import answer, gap


def _takes_embeddings(bare: Bare) -> Any:
    """Whether the bare model computes the same from a text's embeddings as from its ids, and accepts other embeddings."""
    with torch.no_grad():
        own = bare.model.get_input_embeddings()(bare.example.ids)
    call = bare.example.call()
    del call["input_ids"]
    try:
        answer(bare.model, call | {"inputs_embeds": own + 0.1})
        return gap(answer(bare.model, call | {"inputs_embeds": own}), bare.output) <= ROUNDING
    except Exception:  # noqa: BLE001 - it does not, whatever it says
        return False


def _order(columns: int, offsets: Sequence[int]) -> list[int]:
    """The order of tokens (their columns) and slots (-1 - their numbers) in a row."""
    order: list[int] = []
    for column in range(columns + 1):
        order += [-1 - slot for slot, offset in enumerate(offsets) if offset == column]
        order += [column] if column < columns else []
    return order


def _woven(tokens: Tensor, slots: Tensor, order: Sequence[int]) -> Tensor:
    """Tokens and slots in their order. [T, ...], [S, ...] -> [T + S, ...]."""
    return torch.stack([slots[-1 - place] if place < 0 else tokens[place] for place in order])


def _expected(subject: Subject, text: Text, rows: Tensor, embeds: bool) -> Tensor:
    """The bare model's output for one row of text, [1, T], with the prompt's rows in it."""
    assert subject.prompt is not None
    assert subject.kind.offsets is not None
    model, ids = subject.model, text.ids[0]
    order = _order(len(ids), subject.kind.offsets(ids.tolist()))
    call = text.call()
    for name in ("attention_mask", *text.per_token):
        filler = torch.full((len(rows),), int(name == "attention_mask"))
        call[name] = _woven(call[name][0], filler, order)[None]
    embedding = model.get_input_embeddings()
    if embeds:
        del call["input_ids"]
        call["inputs_embeds"] = _woven(embedding(ids[None])[0], rows.to(model.dtype), order)[None]
        output = answer(model, call)
    else:
        call["input_ids"] = _woven(ids, subject.prompt.placeholder_ids, order)[None]
        output = _with_rows(model, embedding, call, rows, order)
    places = [order.index(column) for column in range(len(ids))]
    if subject.structure.entry.causal:  # what stands right before the next token predicts it
        places = [place - 1 for place in places[1:]] + [len(order) - 1]
    return output[:, places] if subject.bare.task.output == "tokens" else output


def _with_rows(model: Any, embedding: Any, call: dict[str, Any], rows: Tensor, order: Sequence[int]) -> Tensor:
    """Run the bare model on ids, with the prompt's rows where its embedding returns those of the placeholder."""
    slots = [column for column, place in enumerate(order) if place < 0]
    numbers = [-1 - order[column] for column in slots]

    def replace(_module: Any, args: Any, output: Tensor) -> Tensor:
        if output.shape[:2] != (1, len(order)):
            return output
        output = output.clone()
        output[0, slots] = rows[numbers].to(output)
        return output

    handle = embedding.register_forward_hook(replace)
    try:
        return answer(model, call)
    finally:
        handle.remove()


def _rows_by_hand(subject: Subject, takes_embeddings: bool) -> Iterator[str]:
    """Not for heads that pool the first column, which a slot then is."""
    assert subject.prompt is not None
    if subject.bare.task.output == "pooled" and not subject.structure.entry.causal:
        return
    rows = subject.prompt.embeddings().detach()
    gaps = []
    for index in range(len(subject.example.ids)):
        text = subject.example.row(index)
        found = answer(subject.model, text.call())
        with softhooks.disabled(subject.model), torch.no_grad():
            expected = _expected(subject, text, rows, takes_embeddings)
        gaps.append(gap(found, expected))
    if max(gaps) > ROUNDING:
        yield f"differs by {max(gaps):.1g} from the prompt's rows put among the text's embeddings"


CHECKS = (
    Check(
        "rows by hand",
        "equals the bare model on the prompt's rows among the text's embeddings",
        _rows_by_hand,
        _takes_embeddings,
        kinds=("prompt", "slots", "anchors"),
    ),
)
