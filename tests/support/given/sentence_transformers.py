"""A tiny embedding model, pairs of texts, and arguments for its Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def names() -> dict[str, Any]:
    """The names that the example expects."""
    import tokens
    import zoo
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = Path(tempfile.mkdtemp(prefix="softhooks-"))
    zoo.build("bert", "sequence").base_model.save_pretrained(folder / "base")
    tokens.masked().save_pretrained(folder / "base")
    texts = ["the cat was great", "a dog", "red or blue", "hello world", "it was bad", "yes", "no", "maybe"]
    return {
        "model": SentenceTransformer(modules=[Transformer(str(folder / "base")), Pooling(32)], device="cpu"),
        "pairs": Dataset.from_dict({"anchor": texts, "positive": [f"the {text} ." for text in texts]}),
        "args": SentenceTransformerTrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
    }
