"""Render templates: convert parts and fields to a row of ids, and find the places of the slots in that row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softhooks.errors import OptionError
from softhooks.layout.template import Message, Part, Template

_SENTINEL = re.compile("\ue000(\\d+)\ue001")
"""The marker for a slot or field in the output of a chat template."""

_SPACE_MARKS = ("\u2581", "\u0120")
"""The characters that SentencePiece and byte-level tokenizers use for the space before a word."""


@dataclass
class Row:
    """A rendered row.

    Attributes:
        ids: the ids, without slots.
        slots: for each slot, the number of ids before it.
        masks: the places of the mask token.
        spans: the start and end of each field, for each of its occurrences in the template.
    """

    ids: list[int]
    slots: list[int]
    masks: list[int]
    spans: dict[str, list[tuple[int, int]]]


def render_row(
    template: Template, tokenizer: Any, fields: Mapping[str, Any], max_length: int | None, **chat: Any
) -> Row:
    """Render a template with the fields of a row.

    Raises:
        OptionError: a field is missing or not a text, or the anchors alone exceed `max_length`.
    """
    if template.messages is None:
        parts, (before, after) = template.parts, special_tokens_of(tokenizer)
    else:
        parts, before, after = in_chat(template.messages, template.parsed, tokenizer, **chat), [], []
    pieces = [_ids_of(part, tokenizer, fields) for part in parts]
    if max_length is not None:
        slots = sum(part.count for part in parts if part.kind == "soft")
        lengths = {i: len(ids) for i, ids in enumerate(pieces) if parts[i].kind == "field"}
        fixed = sum(map(len, pieces)) - sum(lengths.values()) + len(before) + len(after) + slots
        side = getattr(tokenizer, "truncation_side", "right")
        for i, kept in shares(lengths, max_length - fixed, max_length, fixed).items():
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
    """Truncate fields to a budget of tokens, one token at a time from the longest field (the first of equally long fields).

    Returns:
        the number of tokens that each field keeps.

    Raises:
        OptionError: the budget is negative.
    """
    if budget < 0:
        raise OptionError(
            f"max_length={max_length} is too short for the layout: its anchors, special tokens and slots take {fixed} tokens, "
            "which are never cut.",
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
            raise OptionError("the layout has a {mask}, but the tokenizer has no mask token.")
        return [int(tokenizer.mask_token_id)]
    if part.kind == "soft":
        return []
    return encode(text_of(part, fields), tokenizer)


def text_of(part: Part, fields: Mapping[str, Any]) -> str:
    """Return a field's text with the spaces before it, or an empty text if the field is empty.

    Raises:
        OptionError: the field is missing or not a string.
    """
    value = fields.get(part.text)
    if not isinstance(value, str):
        found = "not given" if value is None else repr(value)
        raise OptionError(
            f"the field {part.text!r} of the template is {found}; it must be a string.",
            "If the name differs, rename the field in the template or the column of the data. If the value is not a string, "
            "convert it to a string.",
            field=part.text,
            found=found,
            given=", ".join(map(str, fields)),
        )
    return part.space + value if value else ""


def encode(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a part of a longer text, without special tokens."""
    if not text:
        return []
    # A tokenizer that adds a space before the first word of every text must not get that space a second time.
    if text[:1] == " " and tokenizer.convert_ids_to_tokens(_plain("a", tokenizer))[0][:1] in _SPACE_MARKS:
        text = text[1:]
    return _plain(text, tokenizer)


def _plain(text: str, tokenizer: Any) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def special_tokens_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text, such as [CLS] and [SEP].

    Raises:
        OptionError: the tokenizer also changes the ids of the text.
    """
    plain = _plain("a", tokenizer)
    full = [int(i) for i in tokenizer("a")["input_ids"]]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise OptionError(
        f"{type(tokenizer).__name__} changes the ids {plain} of a text to {full} when it adds special tokens; a template needs "
        "a tokenizer that adds them around the text."
    )


def in_chat(
    messages: Sequence[Message], parsed: Sequence[Sequence[Part]], tokenizer: Any, **options: Any
) -> list[Part]:
    """Insert the parts of each message into the tokenizer's chat template; the text of the template becomes anchors.

    Raises:
        OptionError: the chat template drops, moves or repeats a part.
    """
    held: list[Part] = []
    filled = []
    for message, parts in zip(messages, parsed, strict=True):
        content = ""
        for part in parts:
            content += part.text if part.kind == "text" else f"\ue000{len(held)}\ue001"
            held += [] if part.kind == "text" else [part]
        filled.append({**message, "content": content})
    # The chat template is rendered with a marker for each slot and field, and then split at the markers.
    text = tokenizer.apply_chat_template(filled, tokenize=False, **options)
    pieces = _SENTINEL.split(text)
    if [int(number) for number in pieces[1::2]] != list(range(len(held))):
        raise OptionError(
            "the chat template drops, repeats or reorders the slots and fields of the messages.",
            "Pass the messages in the form that the chat template expects.",
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
