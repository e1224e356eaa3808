"""Names that the example expects: a tiny model, its tokenizer, rows."""

from __future__ import annotations

from typing import Any

import tokens
import training
import transformers as tf
import zoo


def names() -> dict[str, Any]:
    """The names that the example uses."""
    args = tf.TrainingArguments("out", **training.QUIET)
    return {
        "model": zoo.build("llama"),
        "tokenizer": tokens.tokenizer(),
        "dataset": training.rows("causal"),
        "args": args,
    }
