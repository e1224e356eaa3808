"""A tokenizer made offline: one word is one id, `word12` is 12; it frames a text with [BOS] and [EOS] where asked to."""

from __future__ import annotations

from typing import Any

import zoo
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def tokenizer(size: int = zoo.VOCABULARY) -> Any:
    """A tokenizer of `size` ids that adds [BOS] and [EOS] unless told not to."""
    words = {"[PAD]": zoo.PAD, "[BOS]": zoo.BOS, "[EOS]": zoo.EOS, "[UNK]": 3}
    words |= {f"word{i}": i for i in range(4, size)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", zoo.BOS), ("[EOS]", zoo.EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def words(ids: Any) -> str:
    """The text whose ids these are."""
    return " ".join(f"word{int(i)}" for i in ids)
