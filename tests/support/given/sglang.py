"""Names that the example of `softhooks.integrations.sglang` expects."""

from __future__ import annotations

import tempfile
from typing import Any

import tokens
import zoo

import softhooks


def names() -> dict[str, Any]:
    """A tiny Llama with its prompt, its tokenizer, and a directory."""
    model = zoo.build("llama")
    softhooks.attach(model, softhooks.PromptTuning(5))
    return {"model": model, "tokenizer": tokens.tokenizer(), "folder": tempfile.mkdtemp()}
