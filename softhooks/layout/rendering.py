"""Rendering: how the parts of a template and the fields of a row become ids, and where its slots stand among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softhooks.errors import OptionError
from softhooks.layout.template import Message, Part, Template

_SENTINEL = re.compile("\ue000(\\d+)\ue001")


_MARKS = ("\u2581", "\u0120")
"""How SentencePiece and byte-level tokenizers write the blank before a word."""


@dataclass
class Row:
    """A row of ids that grows part by part.

    Attributes:
        ids: the ids. slots: for each slot, how many ids stand before it. masks: where the tokenizer's mask stands.
        spans: where each field stands.
    """

    ids: list[int]
    slots: list[int]
    masks: list[int]
    spans: dict[str, list[tuple[int, int]]]


def render_row(
    template: Template, tokenizer: Any, fields: Mapping[str, Any], max_length: int | None, **chat: Any
) -> Row:
    """Make a row of ids of a template's parts and a data set's fields.

    Raises:
        OptionError: a field is missing or no text, or the anchors alone exceed `max_length`.
    """
    if template.messages is None:
        parts, (before, after) = template.parts, frame_of(tokenizer)
    else:
        parts, before, after = in_chat(template.messages, template.parsed, tokenizer, **chat), [], []
    pieces = [_ids_of(part, tokenizer, fields) for part in parts]
    if max_length is not None:
        slots = sum(part.count for part in parts if part.kind == "soft")
        own = {i: len(ids) for i, ids in enumerate(pieces) if parts[i].kind == "field"}
        fixed = sum(map(len, pieces)) - sum(own.values()) + len(before) + len(after) + slots
        side = getattr(tokenizer, "truncation_side", "right")
        for i, kept in shares(own, max_length - fixed, max_length, fixed).items():
            pieces[i] = pieces[i][:kept] if side == "right" else pieces[i][len(pieces[i]) - kept :]
    row = Row(list(before), [], [], {})
    for part, ids in zip(parts, pieces, strict=True):
        start = len(row.ids)
        row.ids += ids
        row.slots += [start] * (part.count if part.kind == "soft" else 0)
        row.masks += [start] if part.kind == "mask" else []
        if part.kind == "field":
            row.spans.setdefault(part.text, []).append((start, len(row.ids)))
    row.ids += after
    return row


def shares(lengths: Mapping[int, int], budget: int, max_length: int, fixed: int) -> dict[int, int]:
    """Share a budget of tokens among fields: while they exceed it, the longest loses one (of equals, the first).

    Raises:
        OptionError: there is no budget.
    """
    if budget < 0:
        raise OptionError(
            "a row must have room for the anchors, special tokens and slots of its layout: they are never cut.",
            "Raise max_length, or shorten the template.",
            max_length=max_length,
            anchors_and_slots=fixed,
        )
    kept = dict(lengths)
    while sum(kept.values()) > budget:
        kept[max(kept, key=lambda i: kept[i])] -= 1
    return kept


def _ids_of(part: Part, tokenizer: Any, fields: Mapping[str, Any]) -> list[int]:
    if part.kind == "text":
        return encode(part.text, tokenizer)
    if part.kind == "mask":
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise OptionError("the layout has a {mask}; the tokenizer has no mask token.")
        return [int(tokenizer.mask_token_id)]
    if part.kind == "soft":
        return []
    value = fields.get(part.text)
    if not isinstance(value, str):
        raise OptionError(
            "every field of a template must be given as text.",
            "Rename the field in the template, or the column of the data.",
            field=part.text,
            found="nothing" if value is None else repr(value),
            given=", ".join(map(str, fields)),
        )
    return encode(part.space + value, tokenizer) if value else []


def encode(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a piece of running text.

    A tokenizer that marks the first word of a text as if a blank stood before it must not be given that blank too.
    """
    if text[:1] == " " and tokenizer.convert_ids_to_tokens(_plain("a", tokenizer))[0][:1] in _MARKS:
        text = text[1:]
    return _plain(text, tokenizer)


def _plain(text: str, tokenizer: Any) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text, such as [CLS] and [SEP].

    Raises:
        OptionError: it changes the text itself.
    """
    bare = _plain("a", tokenizer)
    framed = [int(i) for i in tokenizer("a")["input_ids"]]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise OptionError(
        f"a tokenizer must put its special tokens around a text; it made {framed} of {bare} ({type(tokenizer).__name__})."
    )


def in_chat(
    messages: Sequence[Message], parsed: Sequence[Sequence[Part]], tokenizer: Any, **options: Any
) -> list[Part]:
    """Put the parts of each message into the tokenizer's chat template; its own text stands between them as anchors.

    Raises:
        OptionError: the template drops, moves or repeats a part.
    """
    held: list[Part] = []
    filled = []
    for message, parts in zip(messages, parsed, strict=True):
        content = ""
        for part in parts:
            content += part.text if part.kind == "text" else f"\ue000{len(held)}\ue001"
            held += [] if part.kind == "text" else [part]
        filled.append({**message, "content": content})
    text = tokenizer.apply_chat_template(filled, tokenize=False, **options)
    pieces = _SENTINEL.split(text)
    if [int(number) for number in pieces[1::2]] != list(range(len(held))):
        raise OptionError(
            "a chat template must keep the slots and fields of its messages, each once and in order.",
            "Give the messages as the template expects them.",
            parts=len(held),
            kept=", ".join(pieces[1::2]) or "none",
        )
    result = []
    for i, piece in enumerate(pieces):
        if i % 2:
            result.append(held[int(piece)])
        elif piece:
            result.append(Part("text", piece))
    return result
