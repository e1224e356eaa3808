"""Tiny sentence models made offline, pairs to train them on, and a quiet Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokens
import torch
import zoo

TEXTS = [
    "the cat was great",
    "a dog",
    "red or blue , yes",
    "hello world",
    "it was bad",
    "question",
    "no",
    "maybe the answer",
]
CAUSAL = ("qwen3", "llama", "gpt2")
WARNINGS = (
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:.*(list|set) of Tensor.*:UserWarning",
)


def save(folder: Path, model: Any, tokenizer: Any = None) -> str:
    """Save a transformers model and its tokenizer, to be loaded by the library itself."""
    model.save_pretrained(folder)
    (tokens.masked() if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


def embedder(folder: Path, arch: str = "bert", pooling: Any = "mean", *more: Any, **changes: Any) -> Any:
    """An embedding model; texts of causal ones are `word12 word13`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    causal = arch in CAUSAL
    changes = changes | ({"pad_token_id": 0} if arch in ("roberta", "mpnet") else {})
    inner = zoo.build(arch, "causal" if causal else "sequence" if arch != "mpnet" else "tokens", **changes).base_model
    path = save(folder / arch, inner, tokens.tokenizer() if causal else None)
    return SentenceTransformer(modules=[Transformer(path), Pooling(32, pooling), *more], device="cpu")


def pairs() -> Any:
    """Texts and what they should be close to."""
    from datasets import Dataset

    return Dataset.from_dict({"anchor": TEXTS, "positive": [f"the {text} ." for text in TEXTS]})


def arguments(folder: Path, **options: Any) -> Any:
    """Arguments of a short training."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    given = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return SentenceTransformerTrainingArguments(str(folder), **{**given, **options})


def base(model: Any) -> dict[str, torch.Tensor]:
    """Copies of every tensor but the prompt's, under names that do not depend on whether there is a prompt."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "soft_prompt." not in name}
