"""Tokenize strings that are passed as options."""

from __future__ import annotations

from typing import Any

from softhooks.errors import OptionError

IGNORE_INDEX = -100
"""The label of a token that the loss ignores, as in transformers."""


def tokenizer_of(tokenizer: Any) -> Any:
    """Return a tokenizer, loading it if it is given by name."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def tokenize(text: str, tokenizer: Any, option: str) -> list[int]:
    """Tokenize a string without special tokens. Errors mention `option`, the name of the option that contains the string."""
    if tokenizer is None:
        raise OptionError(
            f"{option} contains text, but no tokenizer was given.",
            "Pass `tokenizer=`: the model's tokenizer or its name.",
            **{option: repr(text)},
        )
    ids = tokenizer_of(tokenizer)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise OptionError(f"{option} is {text!r}, which has no tokens; it must have at least one.")
    return [int(i) for i in ids]
