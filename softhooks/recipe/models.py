"""Load the model that `softhooks train` trains a prompt for, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from softhooks.compat.quiet import without_warnings
from softhooks.errors import CheckpointError, OptionError
from softhooks.recipe.options import Precision


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; if it has no padding token, as for many decoders, pad with the end-of-sequence token."""
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise OptionError(
                f"the tokenizer of {name!r} has neither a padding token nor an end-of-sequence token; one of them is needed.",
                "Set `pad_token` in the tokenizer's config.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_language_model(name: str, precision: Precision) -> PreTrainedModel:
    """Load a causal language model or an encoder-decoder."""
    config = _load(AutoConfig, name)
    auto = "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"
    model: PreTrainedModel = _load(getattr(transformers, auto), name, dtype=dtype_of(precision))
    return model


def load_classifier(
    name: str, precision: Precision, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load a model with a new head for these labels."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    options = {"num_labels": len(labels), **names, "ignore_mismatched_sizes": True}
    auto = transformers.AutoModelForSequenceClassification
    model: PreTrainedModel = _load(auto, name, dtype=dtype_of(precision), **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of the frozen weights; `auto` is bfloat16 on a GPU that supports it, and float32 otherwise."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _load(auto: Any, name: str, **options: Any) -> Any:
    try:
        with without_warnings():  # of a newly initialized head, which is trained with the prompt
            return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"`{auto.__name__}.from_pretrained` cannot load {name!r} (--model).",
            "Give a directory written by `save_pretrained` of the model and of its tokenizer, or a name on the Hub.",
            error=" ".join(str(error).split())[:300],
        ) from error
