"""Layers whose biases and windows count columns (ALiBi in MPT, local attention in GPT-Neo) keep text and prompt together."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_words
import torch
import transformers as tf
import zoo
from torch.nn import functional

import softhooks


def _mpt() -> Any:
    return tf.MptForCausalLM(tf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=zoo.VOCABULARY, max_seq_len=64))


def _gpt_neo() -> Any:
    return tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=zoo.VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=6,
            attention_types=[[["global", "local"], 1]],
        )
    )  # fmt: skip


def _falcon() -> Any:
    return tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=zoo.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
            new_decoder_architecture=False,
        )
    )  # fmt: skip


MODELS = {"mpt": _mpt, "gpt-neo": _gpt_neo, "falcon-alibi": _falcon, "bloom": lambda: zoo.build("bloom")}


@cache
def _model(name: str) -> Any:
    return zoo.with_large_weights(MODELS[name])


def _padded(ids: torch.Tensor, left: int) -> dict[str, torch.Tensor]:
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: functional.pad(value, (left, 0)) for key, value in call.items()}


@pytest.mark.parametrize("name", MODELS)
def test_words_are_the_same_behind_any_padding(name):
    model, ids = _model(name), zoo.text(1, 9)
    for measure in (real_words.prefix_gap, real_words.front_gap, real_words.slots_gap):
        for padding in ({}, {"left": 4}, {"left": 1, "right": 2}):
            assert measure(model, ids, 3, **padding) < 1e-5, (measure.__name__, padding)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generation_does_not_depend_on_padding(name):
    model, ids = _model(name), zoo.text(1, 7)
    for method in (softhooks.PromptTuning(3, init="random"), softhooks.PrefixTuning(3, init="random")):
        with softhooks.attach(model, method) as prompt:
            for parameter in prompt.parameters():
                parameter.normal_(std=0.5)
            alone = model.generate(**_padded(ids, 0), max_new_tokens=5, do_sample=False)[:, 7:]
            padded = model.generate(**_padded(ids, 5), max_new_tokens=5, do_sample=False)[:, 12:]
            assert torch.equal(alone, padded), method.kind


@pytest.mark.parametrize("name", ["mpt", "bloom"])
@torch.no_grad()
def test_layers_without_a_prefix_and_attentions_keep_the_text_alone(name):
    model, ids = _model(name), zoo.text(1, 7)
    with softhooks.attach(model, softhooks.PTuningV2(3, layers=[1])) as prompt:
        for parameter in prompt.parameters():
            parameter.normal_(std=0.5)
        alone = model(**_padded(ids, 0), output_attentions=True)
        padded = model(**_padded(ids, 4), output_attentions=True)
    torch.testing.assert_close(padded.logits[:, 4:], alone.logits, atol=1e-4, rtol=1e-4)
    for own, wide in zip(alone.attentions, padded.attentions, strict=True):
        torch.testing.assert_close(wide[..., 4:, 4:], own, atol=1e-5, rtol=1e-4)
