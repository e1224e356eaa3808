"""Anchors: tokens or words of a text that slots stand next to, found in its ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from softhooks.errors import OptionError

Which = Literal["first", "last"]
Said = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Anchor:
    """What slots stand next to.

    Attributes:
        said: what the user gave: a token or words, an id, or ids in a row.
        ids: each way in which it may stand in a text; empty while only a tokenizer could tell.
    """

    said: Said
    ids: tuple[tuple[int, ...], ...] = ()

    def bound(self, tokenizer: Any) -> Anchor:
        """Find out the ids of words.

        Raises:
            OptionError: the tokenizer has no ids for them.
        """
        if self.ids or not isinstance(self.said, str):
            return self
        return Anchor(self.said, _ways(self.said, tokenizer))

    def find(self, ids: Tensor, mask: Tensor, which: Which) -> tuple[Tensor, Tensor, Tensor]:
        """Find the anchor in each row.

        Args:
            ids, mask: the text's, [B, T]; padding is no text, whatever its id.
            which: of several places.

        Returns:
            whether it is there, and how many real tokens stand before it, and before its end; [B] each.
        """
        real = mask.bool()
        counted = real.long().cumsum(-1)
        batch, columns = ids.shape
        best = torch.full((batch,), -1, device=ids.device)
        start = torch.zeros(batch, dtype=torch.long, device=ids.device)
        end = start
        for way in self.ids:
            length = len(way)
            if length > columns:
                continue
            pattern = torch.tensor(way, device=ids.device)
            stands = (ids.unfold(1, length, 1) == pattern).all(-1) & real.unfold(1, length, 1).all(-1)
            places = torch.arange(stands.shape[1], device=ids.device)
            # One number ranks them: the column first, then the length, for the longer way says more.
            rank = (columns - places if which == "first" else places + 1) * (columns + 1) + length
            rank = torch.where(stands, rank, -1)
            found, column = rank.max(-1)
            first = counted.gather(1, column[:, None])[:, 0] - 1
            better = found > best
            start, end = torch.where(better, first, start), torch.where(better, first + length, end)
            best = torch.maximum(best, found)
        return best >= 0, start, end


def anchor_of(said: Any, tokenizer: Any) -> Anchor:
    """Check what a user gave as an anchor.

    Raises:
        OptionError: it is neither words nor ids.
    """
    if isinstance(said, str) and said.strip():
        return Anchor(said) if tokenizer is None else Anchor(said).bound(tokenizer)
    row = (said,) if isinstance(said, int) else said
    is_row = isinstance(row, (tuple, list)) and len(row) > 0
    if not is_row or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in row):
        raise OptionError(f"an anchor must be a token, words, an id, or a tuple of ids; it is {said!r}.")
    return Anchor(said if isinstance(said, int) else tuple(row), (tuple(row),))


def _ways(words: str, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """How words may stand in ids: as a token of the vocabulary, at the start of a text, and behind a space."""
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ways: list[tuple[int, ...]] = []
    token = tokenizer.convert_tokens_to_ids(words)
    if isinstance(token, int) and (token != tokenizer.unk_token_id or words == tokenizer.unk_token):
        ways.append((token,))
    for text in (words, f" {words}"):
        row = tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        if row and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in row):
            ways.append(row)
    if not ways:
        raise OptionError(
            "an anchor must be something that the tokenizer can write.",
            "Give another anchor, or its ids as a tuple.",
            anchor=repr(words),
            tokenizer=f"{type(tokenizer).__name__}, which knows it as {tokenizer.unk_token!r} only",
        )
    return tuple(dict.fromkeys(ways))


def anchors_from(said: Any, option: str, tokenizer: Any) -> list[tuple[Anchor, int]]:
    """Check `after` or `before`: anchors, and how many slots stand there.

    Raises:
        OptionError: it is no such mapping.
    """
    pairs = list(said.items()) if isinstance(said, dict) else None
    if pairs is None:
        raise OptionError(f"{option} must map anchors to numbers of slots, such as {{'?': 2}}; it is {said!r}.")
    return [
        (anchor_of(anchor, tokenizer), count_of(count, f"{option}[{anchor!r}]", least=1)) for anchor, count in pairs
    ]


def count_of(count: Any, option: str, least: int = 0) -> int:
    """Check a number of slots.

    Raises:
        OptionError: it is no whole number, or too small.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise OptionError(f"{option} must be a whole number of {least} or more; it is {count!r}.")
    return count


def as_ids(value: Any) -> Sequence[tuple[int, ...]]:
    """Check rows of ids that a file holds.

    Raises:
        OptionError: they are none.
    """
    rows = value if isinstance(value, list) else None
    if rows is None or any(
        not isinstance(row, list) or not row or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in row)
        for row in rows
    ):
        raise OptionError(f"a layout's ids must be lists of whole numbers; they are {value!r}.")
    return [tuple(row) for row in rows]
