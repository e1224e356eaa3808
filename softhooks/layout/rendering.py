"""Render templates: convert fields to ids, and compute the places of the slots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softhooks.errors import OptionError
from softhooks.layout.template import Message, Part, Template

_SENTINEL = re.compile("\ue000(\\d+)\ue001")
"""The marker for a slot, mask or field in the output of a chat template."""

_SPACE_MARKS = ("\u2581", "\u0120")
"""The characters for a leading space in the tokens of SentencePiece and of byte-level tokenizers."""


@dataclass
class Row:
    """A rendered row.

    Attributes:
        ids: the ids, without slots.
        slots: for each slot, the number of ids before it.
        masks: the indices of the mask tokens.
        spans: for each field, the start and end of each of its occurrences.
    """

    ids: list[int]
    slots: list[int]
    masks: list[int]
    spans: dict[str, list[tuple[int, int]]]


def render_row(
    template: Template,
    tokenizer: Any,
    fields: Mapping[str, Any],
    max_length: int | None,
    word: int | None = None,
    **chat: Any,
) -> Row:
    """Render a template with the fields of a row; `word` is the id at `{mask}`, by default that of the tokenizer's mask token."""
    if template.messages is None:
        parts, (before, after) = template.parts, _special_tokens_of(tokenizer)
    else:
        parts, before, after = _in_chat(template.messages, template.parsed, tokenizer, **chat), [], []
    pieces = [_ids_of(part, tokenizer, fields, word) for part in parts]
    if max_length is not None:
        slots = sum(part.count for part in parts if part.kind == "soft")
        lengths = {i: len(ids) for i, ids in enumerate(pieces) if parts[i].kind == "field"}
        fixed = sum(map(len, pieces)) - sum(lengths.values()) + len(before) + len(after) + slots
        side = getattr(tokenizer, "truncation_side", "right")
        for i, kept in _truncated(lengths, max_length, fixed).items():
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


def _truncated(lengths: dict[int, int], max_length: int, fixed: int) -> dict[int, int]:
    """Shorten the longest field, one token at a time, until the fields and the `fixed` tokens fit into `max_length`."""
    if fixed > max_length:
        raise OptionError(
            f"max_length={max_length} is too short; the template's anchors, special tokens and slots take up {fixed} tokens, "
            "which are never truncated.",
            "Raise max_length, or shorten the template.",
        )
    kept = dict(lengths)
    while sum(kept.values()) > max_length - fixed:
        kept[max(kept, key=lambda i: kept[i])] -= 1
    return kept


def _ids_of(part: Part, tokenizer: Any, fields: Mapping[str, Any], word: int | None) -> list[int]:
    if part.kind == "text":
        return encode(part.text, tokenizer)
    if part.kind == "mask":
        return [_mask_token_of(tokenizer) if word is None else word]
    if part.kind == "soft":
        return []
    return encode(text_of(part, fields), tokenizer)


def _mask_token_of(tokenizer: Any) -> int:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise OptionError(
            "the layout has a {mask}, but the tokenizer has no mask token.",
            "For a causal language model, pass `verbalizer=Verbalizer(words, tokenizer, causal=True)` to the mapper or the "
            "collator: the word of the row's class then replaces {mask}.",
        )
    return int(tokenizer.mask_token_id)


def text_of(part: Part, fields: Mapping[str, Any]) -> str:
    """Return a field's text with the spaces before it, or an empty string if the field is empty."""
    value = fields.get(part.text)
    if not isinstance(value, str):
        found = "not given" if value is None else repr(value)
        raise OptionError(
            f"the field {part.text!r} of the template is {found}; it must be a string.",
            "Name the field after a column of the data, and convert the column's values to strings.",
            given=", ".join(map(str, fields)),
        )
    return part.space + value if value else ""


def encode(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a part of a longer text, without special tokens."""
    if not text:
        return []
    # Drop the leading space if the tokenizer adds one before every string.
    if text[:1] == " " and tokenizer.convert_ids_to_tokens(_plain("a", tokenizer))[0][:1] in _SPACE_MARKS:
        text = text[1:]
    return _plain(text, tokenizer)


def _plain(text: str, tokenizer: Any) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _special_tokens_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after the text, such as [CLS] and [SEP]."""
    plain = _plain("a", tokenizer)
    full = [int(i) for i in tokenizer("a")["input_ids"]]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise OptionError(
        f"{type(tokenizer).__name__} encodes 'a' as {plain} without special tokens and as {full} with them; a template needs a "
        "tokenizer that adds special tokens only before and after the text."
    )


def _in_chat(
    messages: Sequence[Message], parsed: Sequence[Sequence[Part]], tokenizer: Any, **options: Any
) -> list[Part]:
    """Apply the tokenizer's chat template to messages, and split the result into parts."""
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
            "the chat template drops, repeats or reorders slots and fields of the messages.",
            "Pass messages whose roles and order the chat template supports.",
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
