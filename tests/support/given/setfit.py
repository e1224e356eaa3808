"""A tiny SetFit model, labeled texts, and arguments for its Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def names() -> dict[str, Any]:
    """The names that the example expects."""
    import tokens
    import zoo
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from setfit import SetFitModel, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    folder = Path(tempfile.mkdtemp(prefix="softhooks-"))
    zoo.build("bert", "sequence").base_model.save_pretrained(folder / "base")
    tokens.masked().save_pretrained(folder / "base")
    body = SentenceTransformer(modules=[Transformer(str(folder / "base")), Pooling(32)], device="cpu")
    texts = ["the cat was great", "the dog was great", "hello great world", "it was bad", "a bad dog", "no bad cat"]
    return {
        "model": SetFitModel(model_body=body, model_head=LogisticRegression()),
        "dataset": Dataset.from_dict({"text": texts, "label": [1, 1, 1, 0, 0, 0]}),
        "args": TrainingArguments(
            output_dir=str(folder / "run"),
            batch_size=4,
            max_steps=4,
            body_learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        ),
    }
