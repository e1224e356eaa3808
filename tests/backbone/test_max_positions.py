"""A warning, given once, for prompt and text beyond the positions that rotary embeddings were trained for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
import zoo

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning

METHODS = [PromptTuning(20), PrefixTuning(20), PromptTuning(20, placement="after_first")]
each_method = pytest.mark.parametrize("method", METHODS, ids=["shared", "prefix", "slots"])


def said(call: Any) -> list[str]:
    """The texts of the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    messages = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return [message for message in messages if "more than the model was trained for" in message]


@each_method
@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3"])
def test_a_forward_beyond_is_warned_of_once(method: Any, arch: str) -> None:
    model = zoo.build(arch)
    with softhooks.attach(model, method):
        assert said(lambda: model(zoo.text(2, 76))) == []
        [told] = said(lambda: model(zoo.text(2, 77)))
        assert [line.split() for line in told.splitlines()[1:4]] == [
            ["prompt:", "20"], ["text:", "77"], ["max", "position", "embeddings:", "96"],
        ]  # fmt: skip
        assert said(lambda: model(zoo.text(2, 90))) == []
    with softhooks.attach(zoo.build(arch), method) as prompt:
        assert len(said(lambda: prompt.model(zoo.text(2, 90)))) == 1


@each_method
def test_padding_does_not_count_and_generated_tokens_do(method: Any) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 80)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    with softhooks.attach(model, method):
        assert said(lambda: model(ids, attention_mask=mask)) == []
        short = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert said(lambda: model.generate(ids[:, :70], max_new_tokens=6, **short)) == []
        [told] = said(lambda: model.generate(ids[:, :70], max_new_tokens=10, **short))
        assert "text:                    77" in told


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 192),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 96}, 192),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 48}, 96),
    ],
)
def test_a_scale_counts(rope: dict[str, Any], limit: int) -> None:
    model = zoo.build("llama", rope_parameters=rope)
    with softhooks.attach(model, PrefixTuning(20)):
        assert said(lambda: model(zoo.text(1, limit - 20))) == []
        [told] = said(lambda: model(zoo.text(1, limit - 19)))
        assert f"max position embeddings: {limit}" in told


def test_rotary_embeddings_that_adapt_are_none_of_it() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 96}
    model = zoo.build("llama", rope_parameters=rope)
    with softhooks.attach(model, PromptTuning(20, placement="after_first")):
        assert said(lambda: model(zoo.text(1, 100))) == []


@pytest.mark.parametrize(("arch", "head"), [("bloom", "causal"), ("t5", "seq2seq"), ("deberta-v2", "masked")])
def test_positions_without_a_limit_are_not_warned_of(arch: str, head: str) -> None:
    model, case = zoo.build(arch, head), zoo.Case(arch, head)
    with softhooks.attach(model, PromptTuning(20)):
        assert said(lambda: model(**zoo.inputs(case, zoo.text(1, 120)))) == []


def test_falcons_alibi_has_no_limit() -> None:
    config = tf.FalconConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        max_position_embeddings=96,
    )
    model = tf.FalconForCausalLM(config).eval()
    with softhooks.attach(model, PromptTuning(20)):
        assert said(lambda: model(zoo.text(1, 120))) == []


def test_a_branch_and_a_model_with_its_prompts_off_are_not_warned_of() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, LlamaAdapter(20)):
        assert said(lambda: model(zoo.text(1, 90))) == []
    with softhooks.attach(model, PrefixTuning(20)), softhooks.disabled(model):
        assert said(lambda: model(zoo.text(1, 90))) == []


def test_attaching_says_nothing_of_its_own_probe() -> None:
    model = zoo.build("llama")
    assert said(lambda: softhooks.attach(model, PromptTuning(94))) == []
    assert len(said(lambda: model(zoo.text(1, 5)))) == 1
    assert said(lambda: copy.deepcopy(model)(zoo.text(1, 5))) == []
