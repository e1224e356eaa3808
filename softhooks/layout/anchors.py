"""Anchors: words or tokens in a text, next to which a layout inserts slots for virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from softhooks.errors import OptionError, check_int, is_int
from softhooks.layout.tokenizing import tokenizer_of

Which = Literal["first", "last"]
AnchorValue = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Anchor:
    """Words or tokens in a text, next to which slots are inserted.

    Attributes:
        value: the words, the id or the ids, as passed by the user.
        ids: the possible encodings of the words, each a sequence of ids; empty until the tokenizer is known.
    """

    value: AnchorValue
    ids: tuple[tuple[int, ...], ...] = ()

    def bound(self, tokenizer: Any) -> Anchor:
        """Return the anchor with its words encoded by the tokenizer."""
        if self.ids or not isinstance(self.value, str):
            return self
        return Anchor(self.value, _tokenizations(self.value, tokenizer))

    def find(self, ids: Tensor, mask: Tensor, which: Which) -> tuple[Tensor, Tensor, Tensor]:
        """Find the anchor in each row.

        Args:
            ids, mask: the input ids and the attention mask of the text, [B, T]. Padding never matches, whatever its id is.
            which: the match to use if a row has several.

        Returns:
            whether each row contains the anchor, and the number of real tokens before its start and before its end; [B] each.
        """
        real = mask.bool()
        counted = real.long().cumsum(-1)
        batch, columns = ids.shape
        best = torch.full((batch,), -1, device=ids.device)
        start = torch.zeros(batch, dtype=torch.long, device=ids.device)
        end = start
        for sequence in self.ids:
            length = len(sequence)
            if length > columns:
                continue
            pattern = torch.tensor(sequence, device=ids.device)
            matches = (ids.unfold(1, length, 1) == pattern).all(-1) & real.unfold(1, length, 1).all(-1)
            places = torch.arange(matches.shape[1], device=ids.device)
            # One number ranks the matches: by column, then by length, because a longer match is more specific.
            rank = (columns - places if which == "first" else places + 1) * (columns + 1) + length
            rank = torch.where(matches, rank, -1)
            found, column = rank.max(-1)
            first = counted.gather(1, column[:, None])[:, 0] - 1
            better = found > best
            start, end = torch.where(better, first, start), torch.where(better, first + length, end)
            best = torch.maximum(best, found)
        return best >= 0, start, end


def anchor_of(value: Any, tokenizer: Any) -> Anchor:
    """Make an anchor from the words, the id or the ids that a user passed."""
    if isinstance(value, str) and value.strip():
        return Anchor(value) if tokenizer is None else Anchor(value).bound(tokenizer)
    row = (value,) if isinstance(value, int) else value
    if not isinstance(row, (tuple, list)) or not row or not all(is_int(item, 0) for item in row):
        raise OptionError(f"the anchor is {value!r}; it must be a string, a token id, or a tuple of token ids.")
    return Anchor(value if isinstance(value, int) else tuple(row), (tuple(row),))


def _tokenizations(words: str, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Encode words in each way in which they may occur: as a single token, at the start of a text, and after a space."""
    tokenizer = tokenizer_of(tokenizer)
    sequences: list[tuple[int, ...]] = []
    token = tokenizer.convert_tokens_to_ids(words)
    if isinstance(token, int) and (token != tokenizer.unk_token_id or words == tokenizer.unk_token):
        sequences.append((token,))
    for text in (words, f" {words}"):
        row = tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        if row and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in row):
            sequences.append(row)
    if not sequences:
        raise OptionError(
            f"the tokenizer encodes the anchor {words!r} as {tokenizer.unk_token!r}, so texts cannot be searched for it.",
            "Choose another anchor, or pass its ids as a tuple.",
            tokenizer=type(tokenizer).__name__,
        )
    return tuple(dict.fromkeys(sequences))


def anchors_from(value: Any, option: str, tokenizer: Any) -> list[tuple[Anchor, int]]:
    """Parse the option `after` or `before`, which maps anchors to numbers of slots."""
    if not isinstance(value, dict):
        raise OptionError(f"{option} is {value!r}; it must map anchors to numbers of slots, such as {{'?': 2}}.")
    for anchor, count in value.items():
        check_int(f"{option}[{anchor!r}]", count)
    return [(anchor_of(anchor, tokenizer), count) for anchor, count in value.items()]


def ids_from_json(value: Any) -> Sequence[tuple[int, ...]]:
    """Read sequences of ids from a saved layout."""
    rows: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(row, list) and row and all(is_int(item, 0) for item in row) for row in rows):
        raise OptionError(f"the ids in the saved layout are {value!r}; they must be lists of integers.")
    return [tuple(row) for row in rows]
