"""Tokenizers made offline: words as ids; BERT-like with special tokens and a mask; byte-level BPE with a chat template."""

from __future__ import annotations

from typing import Any

import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def tokenizer(size: int = zoo.VOCABULARY) -> Any:
    """A tokenizer of `size` ids, `word12` is 12, that adds [BOS] and [EOS] unless told not to."""
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


WORDS = [
    *(
        "premise",
        "question",
        "answer",
        "yes",
        "no",
        "maybe",
        "it",
        "was",
        "great",
        "bad",
        "the",
        "red",
        "blue",
        "cat",
        "dog",
    ),
    *("a", "b", "c", "d", "e", "f", "g", "h", "hello", "world", ",", ".", "?", ":", "!"),
]


def masked() -> Any:
    """A tokenizer like BERT's: words and punctuation, [CLS] and [SEP] around a text, [MASK], token types."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": token for name, token in names.items()},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def merged() -> Any:
    """Byte-level BPE like GPT-2's: a space belongs to the next word; the end token is the padding; with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = ["Question: what is it? Answer: yes", " the cat was great, the dog was bad.", "user assistant system"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = CHAT
    return made
