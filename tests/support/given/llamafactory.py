"""Names that the example of LLaMA-Factory expects."""

from __future__ import annotations

from typing import Any

import training
import transformers as tf
import zoo


def names() -> dict[str, Any]:
    """A tiny model, its data, and the Trainer that LLaMA-Factory's own derives from."""
    return {
        "model": zoo.build("llama"),
        "dataset": training.rows("causal"),
        "Seq2SeqTrainer": tf.Seq2SeqTrainer,
        "Seq2SeqTrainingArguments": tf.Seq2SeqTrainingArguments,
    }
