"""Names that the example expects: a tiny model, its tokenizer, rows, and a local tracker."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import tokens
import training
import transformers as tf
import zoo


def names() -> dict[str, Any]:
    """The names that the example uses."""
    os.environ["MLFLOW_TRACKING_URI"] = (Path(tempfile.mkdtemp()) / "mlruns").as_uri()
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    args = tf.TrainingArguments("out", **{**training.QUIET, "report_to": ["mlflow"]})
    return {
        "model": zoo.build("llama"),
        "tokenizer": tokens.tokenizer(),
        "dataset": training.rows("causal"),
        "args": args,
    }
