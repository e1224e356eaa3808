"""Names that the example expects: a tiny model, its tokenizer, rows, and a local tracker."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import tokens
import training
import transformers as tf
import zoo


def names() -> dict[str, Any]:
    """The names that the example uses."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": tempfile.mkdtemp()}
    args = tf.TrainingArguments("out", **{**training.QUIET, "report_to": ["wandb"]})
    return {
        "model": zoo.build("llama"),
        "tokenizer": tokens.tokenizer(),
        "dataset": training.rows("causal"),
        "args": args,
    }
