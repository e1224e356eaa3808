"""The names that the Python blocks of the documentation expect: a tiny model and whatever a user already has.

Each block gets a new model with the same weights, as a new process would load it. The names that a page defines itself, and the
files that it writes, stay until its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokens
import torch
import training
import transformers as tf
import zoo

import softhooks


def common() -> dict[str, Any]:
    """The names that every page may use."""
    return {"softhooks": softhooks, "torch": torch, "Trainer": tf.Trainer, "args": _arguments()}


def _arguments() -> tf.TrainingArguments:
    options = {**training.QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    return tf.TrainingArguments("run", **options)


def language_model() -> dict[str, Any]:
    """A causal model with a byte-level tokenizer, which takes any text."""
    tokenizer = tokens.merged()
    model = zoo.build("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = training.rows("causal")
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    texts = ["the cat was great", "what is it", "yes"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "train_dataset": rows,
        "loader": loader,
        "ids": zoo.text(2, 6),
        "inputs": tokenizer("Question: what is it?", return_tensors="pt"),
        "batch": batch,
    }


def with_saved_prompts() -> dict[str, Any]:
    """The same, with two prompts that were trained before."""
    names = language_model()
    for name in ("en", "de"):
        with softhooks.attach(names["model"], softhooks.PromptTuning(4)) as prompt:
            prompt.save_pretrained(f"prompts/{name}")
            prompt.save_pretrained("my-prompt")
    return names


def with_saved_classifier() -> dict[str, Any]:
    """The same, with a base model without a head in a directory, and a prompt that was trained with a head on it."""
    names = language_model()
    names["model"].model.save_pretrained("base")
    names["tokenizer"].save_pretrained("base")
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    classifier = tf.AutoModelForSequenceClassification.from_pretrained("base", **labels)
    with softhooks.attach(classifier, softhooks.PromptTuning(4)) as prompt:
        prompt.save_pretrained("sst2-prompt")
    return names | {"base": "base"}


def methods() -> dict[str, Any]:
    """The same, with a batch of four rows that have labels."""
    names = language_model()
    names["batch"] = next(iter(names["loader"]))
    return names


def masked() -> dict[str, Any]:
    """A masked language model and rows of two texts with a class."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = tokens.masked()
    rows = [
        {"premise": premise, "hypothesis": hypothesis, "label": number % 2}
        for number, (premise, hypothesis) in enumerate(
            [("hello world", "cat"), ("red", "dog"), ("a b", "c"), ("it was", "d")]
        )
    ]
    return {"model": zoo.build("bert", "masked"), "tokenizer": tokenizer, "dataset": datasets.Dataset.from_list(rows)}


def masked_and_causal() -> dict[str, Any]:
    """The same, and a causal model with a tokenizer that has no mask token and knows the words of the classes."""
    tokenizer = tokens.merged()
    tokenizer.add_tokens([" no", " yes"])
    llama = zoo.build("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    return masked() | {"llama": llama, "llama_tokenizer": tokenizer}


def tagging() -> dict[str, Any]:
    """A model with a new tagging head, and the tags of a text."""
    ids = zoo.text(2, 6)
    return {"tagger": zoo.build("bert", "tokens"), "ids": ids, "tags": ids % 3}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": with_saved_prompts,
    "docs/batch-columns.md": language_model,
    "docs/coming-from-peft.md": language_model,
    "docs/errors.md": language_model,
    "docs/examples.md": language_model,
    "docs/guarantees.md": language_model,
    "docs/how-it-works.md": language_model,
    "docs/layouts.md": masked_and_causal,
    "docs/methods.md": methods,
    "docs/methods/cartridges.md": language_model,
    "docs/methods/context-aware-prompt-tuning.md": language_model,
    "docs/methods/context-tuning.md": language_model,
    "docs/methods/llama-adapter.md": language_model,
    "docs/methods/multitask-prompt-tuning.md": methods,
    "docs/methods/p-tuning-v2.md": tagging,
    "docs/methods/p-tuning.md": masked,
    "docs/methods/prefix-tuning.md": language_model,
    "docs/methods/prompt-ensembles.md": with_saved_prompts,
    "docs/methods/prompt-tuning.md": language_model,
    "docs/methods/residual-prompt-tuning.md": language_model,
    "docs/methods/spot.md": with_saved_prompts,
    "docs/models.md": language_model,
    "docs/quick-start.md": language_model,
    "docs/saving.md": language_model,
    "docs/serving.md": with_saved_prompts,
    "docs/several-prompts.md": with_saved_prompts,
    "docs/trainer.md": with_saved_classifier,
    "docs/training-loop.md": language_model,
}
"""The names of each page with Python blocks; `docs/frameworks.md` has those of the integrations' examples."""

PACKAGES = {"docs/coming-from-peft.md": ("peft",)}
"""The packages that a page needs, if they are not those of every environment."""
