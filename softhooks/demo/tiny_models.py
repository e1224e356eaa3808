"""Tiny random models for `--quick`: an encoder and a decoder of two layers, whose vocabulary is the words of some texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softhooks.demo.models import Checkpoint

HIDDEN_SIZE = 32
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_PAD, _, _CLS, _SEP = range(4)


def tiny_encoder(texts: Iterable[str], directory: Path) -> Checkpoint:
    """Save a BERT and its tokenizer in a directory."""
    words = _words(texts)
    words.post_processor = processors.BertProcessing(("[SEP]", _SEP), ("[CLS]", _CLS))
    _save(words, directory, cls_token="[CLS]", sep_token="[SEP]")
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(directory)
    return Checkpoint("a tiny random BERT", str(directory))


def tiny_decoder(texts: Iterable[str], directory: Path) -> Checkpoint:
    """Save a Llama and its tokenizer in a directory."""
    words = _words(texts)
    _save(words, directory, eos_token="[SEP]")
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        bos_token_id=None,
        eos_token_id=_SEP,
        pad_token_id=_PAD,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return Checkpoint("a tiny random Llama", str(directory))


def _words(texts: Iterable[str]) -> Tokenizer:
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=list(_SPECIAL_TOKENS), show_progress=False)
    )
    return words


def _save(words: Tokenizer, directory: Path, **special_tokens: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", **special_tokens
    ).save_pretrained(directory)
