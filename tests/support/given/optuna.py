"""Names that the example expects: a tiny model, rows, and arguments that evaluate and save."""

from __future__ import annotations

from typing import Any

import training
import transformers as tf
import zoo


def names() -> dict[str, Any]:
    """The names that the example uses."""
    options = {**training.QUIET, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = tf.TrainingArguments("out", **options)
    return {"model": zoo.build("llama"), "dataset": training.rows("causal"), "args": args}
