"""Left padding in models that are given no positions: rows give the result that they give without padding, or are
refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_words
import torch
import transformers as tf
import zoo
from torch import Tensor
from torch.nn import functional

import softhooks

LEFT, PAD = 3, 0
_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_SEQ2SEQ: dict[str, Any] = _IDS | {
    "vocab_size": zoo.VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_BERT: dict[str, Any] = _IDS | {
    "vocab_size": zoo.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


def _led() -> Any:
    sizes = _SEQ2SEQ | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    return tf.LEDForConditionalGeneration(tf.LEDConfig(**sizes, attention_window=[4, 4]))


def _prophetnet() -> Any:
    sizes = {key: value for key, value in _SEQ2SEQ.items() if not key.endswith(("layers", "heads", "d_model"))}
    config = tf.ProphetNetConfig(
        **sizes, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, ngram=2,
    )  # fmt: skip
    return tf.ProphetNetForConditionalGeneration(config)


def _git() -> Any:
    vision = dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 32) | {"patch_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    return tf.GitForCausalLM(tf.GitConfig(**_BERT, vision_config=vision))


MODELS: dict[str, Any] = {
    "led": _led,
    "prophetnet": _prophetnet,
    "t5": lambda: zoo.build("t5", "seq2seq"),
    "git": _git,
    "roformer": lambda: tf.RoFormerForMaskedLM(tf.RoFormerConfig(**_BERT)),
    "roformer decoder": lambda: tf.RoFormerForCausalLM(tf.RoFormerConfig(**_BERT, is_decoder=True)),
}


@cache
def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def _call(model: Any, ids: Tensor, left: int) -> dict[str, Tensor]:
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    call = {key: functional.pad(value, (left, 0)) for key, value in call.items()}
    return call | ({"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {})


def _loud(prompt: softhooks.SoftPrompt) -> None:
    for parameter in prompt.parameters():
        parameter.data.normal_(std=0.5)


@torch.no_grad()
def _gap(model: Any, ids: Tensor) -> float:
    bare, padded = model(**_call(model, ids, 0)).logits, model(**_call(model, ids, LEFT)).logits
    padded = padded if model.config.is_encoder_decoder else padded[:, LEFT:]
    return float((bare - padded).abs().max() / bare.abs().max())


def test_slots_are_refused_behind_padding_that_the_model_counts():
    model, ids = _model("prophetnet"), zoo.text(2, 7)
    assert _gap(model, ids) > 1e-3  # bare too
    with softhooks.attach(model, softhooks.PromptTuning(3, init="random")), torch.no_grad():
        with pytest.raises(softhooks.UnsupportedModeError, match="depends on padding before the text"):
            model(**_call(model, ids, LEFT))
        right = {key: functional.pad(value, (0, LEFT)) for key, value in _call(model, ids, 0).items()}
        right["decoder_input_ids"] = ids[:, :4]
        torch.testing.assert_close(model(**right).logits, model(**_call(model, ids, 0)).logits, atol=1e-4, rtol=1e-4)


def test_a_prefix_is_refused_where_its_mask_is_laid_over_other_columns():
    model, ids = _model("git"), zoo.text(2, 7)
    with softhooks.attach(model, softhooks.PrefixTuning(3, init="random")), torch.no_grad():
        model(**_call(model, ids, 0))
        with pytest.raises(softhooks.UnsupportedModeError, match="2 rows begin with padding"):
            model(**_call(model, ids, LEFT))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("git", softhooks.PromptTuning(3, init="random")),
        ("led", softhooks.PromptTuning(3, init="random")),
        ("t5", softhooks.PromptTuning(3, init="random")),
        ("t5", softhooks.PrefixTuning(3, init="random")),
        ("roformer", softhooks.PromptTuning(3, init="random")),
        ("roformer", softhooks.PrefixTuning(3, init="random")),
        ("roformer", softhooks.LlamaAdapter(3)),
        ("roformer decoder", softhooks.PromptTuning(3, init="random")),
        ("roformer decoder", softhooks.PrefixTuning(3, init="random")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_row_is_the_same_behind_padding(name, method):
    model = _model(name)
    with softhooks.attach(model, method) as prompt:
        _loud(prompt)
        assert _gap(model, zoo.text(1, 7)) < 1e-4


@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 2}], ids=["none", "left", "right"])
@pytest.mark.parametrize("name", ["roformer", "roformer decoder"])
def test_words_as_a_prefix_stand_before_the_text_in_a_model_with_one_numbering_for_all_rows(name, padding):
    assert real_words.prefix_gap(_model(name), zoo.text(1, 9), 3, **padding) < 1e-5
    assert real_words.front_gap(_model(name), zoo.text(1, 9), 3, **padding) < 1e-5


@pytest.mark.parametrize("method", [softhooks.PrefixTuning(3, init="random"), softhooks.LlamaAdapter(3)])
def test_rows_that_start_in_different_columns_are_refused_by_one_numbering_for_all(method):
    model = _model("roformer")
    batch = _call(model, zoo.text(2, 7), 0)
    batch["attention_mask"][1, :2] = 0
    with softhooks.attach(model, method), torch.no_grad():
        with pytest.raises(softhooks.UnsupportedModeError, match="same positions"):
            model(**batch)
        batch["attention_mask"][1, :2] = 1
        model(**batch)
