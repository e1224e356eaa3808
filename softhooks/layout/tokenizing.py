"""Texts as ids, by a tokenizer or by the name of one."""

from __future__ import annotations

from typing import Any

from softhooks.errors import OptionError

IGNORE_INDEX = -100
"""The label of a token that the loss ignores, as in transformers."""


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer itself, also where its name is given."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def tokenize(text: str, tokenizer: Any, option: str) -> list[int]:
    """Split a text into ids, without special tokens.

    Raises:
        OptionError: no tokenizer was given, or the text is empty.
    """
    if tokenizer is None:
        raise OptionError(
            "initializing from text needs a tokenizer.",
            "Pass `tokenizer=`: the model's own, or its name.",
            **{option: repr(text)},
        )
    ids = tokenizer_of(tokenizer)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise OptionError(f"{option} must hold at least one token; the tokenizer finds none in {text!r}.")
    return [int(i) for i in ids]
