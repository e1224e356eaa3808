"""`Template`, a parsed template. `Layout` describes the syntax."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from softhooks.errors import MAX_VIRTUAL_TOKENS, OptionError, UnsupportedModeError
from softhooks.layout.anchors import ids_from_json
from softhooks.layout.slot_map import Places
from softhooks.layout.tokenizing import tokenize

COLUMN = "soft_slots"
"""The batch column with the number of real tokens before each slot of a template."""

_PIECE = re.compile(
    r"""(?P<brace>\{\{|\}\})
    |\{soft:\s*(?:(?P<count>\d+)|"(?P<words>[^"]+)")\s*(?:,\s*name\s*=\s*(?P<tie>[A-Za-z_]\w*)\s*)?\}
    |\{(?P<field>[A-Za-z_]\w*)\}
    |(?P<text>[^{}]+)""",
    re.VERBOSE,
)

_MAX_LENGTH = 2**20  # characters
_MAX_DIGITS = 9

Message = Mapping[str, str]
Source = str | Sequence[Message]
"""A template, or chat messages with templates as contents."""


@dataclass(frozen=True)
class Part:
    """One part of a template.

    Attributes:
        kind: an anchor (`text`), a `field`, the `mask` token, or slots (`soft`).
        text: the text of an anchor, the name of a field, or the words that initialize slots.
        count: the number of slots; 0 until the words are tokenized.
        tie: the name of tied slots.
        ids: the ids of the words.
        space: the spaces before a field, which are tokenized with it.
    """

    kind: Literal["text", "field", "mask", "soft"]
    text: str = ""
    count: int = 0
    tie: str = ""
    ids: tuple[int, ...] = ()
    space: str = ""


def parse(template: str) -> list[Part]:
    """Split a template into its parts."""
    if len(template) > _MAX_LENGTH:
        raise OptionError(f"the template has {len(template):,} characters; it must have at most {_MAX_LENGTH:,}.")
    parts: list[Part] = []
    place, text = 0, ""
    while place < len(template):
        match = _PIECE.match(template, place)
        if match is None or match["field"] == "soft" or (match["count"] is not None and _count(match) == 0):
            wrong = re.match(r"\{[^{}]*\}", template[place:])
            found = repr(wrong[0] if wrong else template[place : place + 30])
            raise OptionError(
                f"the template contains {found}; braces must contain the name of a field, `mask`, or slots such as {{soft:3}}, "
                '{soft:"some words"} or {soft:2, name=a}.',
                _remedy(wrong[0][1:-1].strip() if wrong else None),
                template=repr(template),
            )
        place = match.end()
        if match["text"] is not None or match["brace"] is not None:
            text += match["text"] or match["brace"][0]
            continue
        anchor = text.rstrip(" ")
        if anchor:
            parts.append(Part("text", anchor))
        parts.append(_part(match, text[len(anchor) :]))
        text = ""
    if text.rstrip(" "):
        parts.append(Part("text", text.rstrip(" ")))
    return parts


def _remedy(inside: str | None) -> str:
    """Return the remedy for braces with invalid content, or for a single brace if `inside` is None."""
    if inside is None:
        return "Double a brace that is part of the text: {{ or }}."
    word = (re.match(r"\w*", inside) or [""])[0]
    if difflib.get_close_matches(word.lower(), ["soft"], cutoff=0.7) or re.search(r"[:=]\s*\d+$", inside):
        return (
            'For slots, write their number, as in {soft:3}, or words that initialize them, as in {soft:"some words"}. For tied '
            "slots, add a name, as in {soft:3, name=a}."
        )
    return (
        "For a field, write a column name of letters, digits and _, as in {text}; for the mask, write {mask}. Double braces that "
        "are part of the text: {{ and }}."
    )


def _part(match: re.Match[str], space: str) -> Part:
    field = match["field"]
    if field == "mask":
        return Part("mask")
    if field is not None:
        return Part("field", field, space=space)
    return Part("soft", match["words"] or "", _count(match), match["tie"] or "")


def _count(match: re.Match[str]) -> int:
    """Return the number of slots; a number with many digits is cut, and refused later."""
    return int((match["count"] or "0")[:_MAX_DIGITS])


def _split(source: Any) -> tuple[tuple[Part, ...], ...]:
    """Split a template, or each message of a chat, into parts."""
    if isinstance(source, str):
        parsed: tuple[tuple[Part, ...], ...] = (tuple(parse(source)),)
    elif isinstance(source, (list, tuple)) and source and all(map(_is_message, source)):
        parsed = tuple(tuple(parse(message["content"])) for message in source)
    else:
        raise OptionError(
            f"the layout is {source!r}; it must be a template, or a list of messages with role and content."
        )
    if not any(part.kind == "soft" for parts in parsed for part in parts):
        raise OptionError(f"the template {source!r} has no slots; add some, such as {{soft:3}}.")
    return parsed


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return False
    return all(isinstance(key, str) and isinstance(value, str) for key, value in message.items())


class Template:
    """A template, or chat messages with templates as contents.

    Args:
        source: the template, or the messages.
        words: the ids of the words that initialize slots, in order, or None if they are not known yet.

    Attributes:
        parsed: the parts of each message; a single template counts as one message.
    """

    placement = "layout"
    may_skip = False
    searches = False

    def __init__(self, source: Source, words: Sequence[tuple[int, ...]] | None = None) -> None:
        self.parsed = _split(source)
        self.source: str | list[dict[str, str]] = source if isinstance(source, str) else [dict(m) for m in source]
        if words is not None:
            remaining = iter(words)
            self.parsed = tuple(tuple(_with_ids(part, remaining) for part in parts) for parts in self.parsed)
        if self.is_bound:
            self._rows()

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The messages of a chat, or None for a single template."""
        return None if isinstance(self.source, str) else self.source

    @property
    def parts(self) -> list[Part]:
        """All parts, in order."""
        return [part for parts in self.parsed for part in parts]

    @property
    def fields(self) -> list[str]:
        """The names of the fields, in order and with repetitions."""
        return [part.text for part in self.parts if part.kind == "field"]

    @property
    def is_bound(self) -> bool:
        """Whether the ids of all words that initialize slots are known."""
        return all(part.count for part in self.parts if part.kind == "soft")

    def bound(self, tokenizer: Any) -> Template:
        """Return the template with the words that initialize slots encoded by the tokenizer."""
        texts = [part.text for part in self.parts if part.kind == "soft" and part.text]
        return Template(self.source, [tuple(tokenize(text, tokenizer, "soft")) for text in texts])

    @property
    def has_tail(self) -> bool:
        """Whether there are slots after the text."""
        return self.messages is None and self.parts[-1].kind == "soft"

    @property
    def ids(self) -> list[int]:
        """The ids of the words that initialize slots."""
        return [token for part in self.parts for token in part.ids]

    @property
    def table_rows(self) -> list[int]:
        """For each slot, the index of its virtual token; tied slots share their virtual tokens."""
        return self._rows()[0]

    @property
    def starts(self) -> dict[int, int]:
        """For each virtual token that is initialized from a word, its index and the id of the word."""
        return self._rows()[1]

    def _rows(self) -> tuple[list[int], dict[int, int]]:
        rows: list[int] = []
        starts: dict[int, int] = {}
        tied: dict[str, tuple[int, Part]] = {}
        count = 0
        for part in self.parts:
            if part.kind != "soft":
                continue
            first, model = tied.setdefault(part.tie, (count, part)) if part.tie else (count, part)
            if (model.count, model.text) != (part.count, part.text):
                raise OptionError(
                    f"the slots named {part.tie!r} are defined as {model.text or model.count!r} and as "
                    f"{part.text or part.count!r}; slots with the same name must have the same number or the same words."
                )
            if len(rows) + part.count > MAX_VIRTUAL_TOKENS:
                raise OptionError(f"the template has more than {MAX_VIRTUAL_TOKENS:,} slots, which is the maximum.")
            rows += range(first, first + part.count)
            starts |= {first + i: token for i, token in enumerate(part.ids)}
            count = max(count, first + part.count)
        return rows, starts

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Return the places of the slots from the batch column `soft_slots`; see `Layout.places`."""
        real = mask.bool().sum(-1)
        columns = len(self.table_rows)
        if given is None or tuple(given.shape) != (len(rows), columns):
            found = "absent" if given is None else list(given.shape)
            raise UnsupportedModeError(
                f"the batch column `{COLUMN}`, with the places of the template's slots, is missing or has the wrong shape.",
                "Create the batch with the layout's `render`, `mapper` or `collator`, and pass the column to the model.",
                given=found,
                expected=[len(rows), columns],
            )
        offsets = given.to(real)
        if bool(((offsets < 0) | (offsets > real[:, None])).any()):
            raise UnsupportedModeError(
                f"`{COLUMN}` is out of range; the number of tokens before a slot must be between 0 and the length of the row.",
                "Truncate rows with the `max_length` of `Layout.mapper`, and call `generate` without `prefill_chunk_size`.",
                tokens=real.tolist(),
                soft_slots=offsets.amax(-1).tolist(),
            )
        return Places(offsets, torch.ones_like(offsets).bool())

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ids, [1, T], and a batch column `soft_slots` of zeros, [1, S], for a test forward pass."""
        return ids, {COLUMN: torch.zeros(1, len(self.table_rows), dtype=torch.long, device=ids.device)}

    def to_json(self) -> dict[str, Any]:
        """Return the template as a JSON-serializable dict, with the ids of its words."""
        return {"template": self.source, "words": [list(part.ids) for part in self.parts if part.ids]}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Template:
        """Create a template from the result of `to_json`."""
        return cls(stored["template"], ids_from_json(stored.get("words")))

    def __repr__(self) -> str:
        return f"Layout({self.source!r})"


def _with_ids(part: Part, words: Iterator[tuple[int, ...]]) -> Part:
    if part.kind != "soft" or not part.text:
        return part
    ids = next(words, ())
    return replace(part, ids=ids, count=len(ids))
