"""Names that the example of `softhooks.integrations.sglang` expects."""

from __future__ import annotations

from typing import Any

import tokens
import zoo

import softhooks


def names() -> dict[str, Any]:
    """A tiny Llama with its prompt, and its tokenizer."""
    model = zoo.build("llama")
    softhooks.attach(model, softhooks.PromptTuning(5))
    return {"model": model, "tokenizer": tokens.tokenizer()}
