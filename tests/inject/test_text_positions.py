"""Models around a text model that make positions and masks themselves: with only a mask, padding does not change a row."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_words
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import softhooks

TEXT: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _gemma3() -> Any:
    text = {**TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    config = tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=150)
    return tf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    text = {**TEXT, "model_type": "gemma", "use_bidirectional_attention": False}
    vision = {**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"}
    config = tf.PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=32, hidden_size=32, image_token_index=150
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def _fuyu() -> Any:
    text = {**TEXT, "model_type": "persimmon", "num_key_value_heads": 4}
    return tf.FuyuForCausalLM(tf.FuyuConfig(text_config=text, **{**TEXT, "num_key_value_heads": 4}, patch_size=8))


def _qwen2_vl() -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision))


MODELS = {"gemma3": _gemma3, "paligemma": _paligemma, "fuyu": _fuyu, "qwen2-vl": _qwen2_vl}


@cache
def _model(name: str) -> Any:
    return zoo.with_large_weights(MODELS[name])


def _padded(ids: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: functional.pad(value, (left, right)) for key, value in call.items()}


@pytest.mark.parametrize("name", MODELS)
def test_words_are_the_same_with_every_injection(name):
    model, ids = _model(name), zoo.text(1, 9)
    for measure in (real_words.prefix_gap, real_words.front_gap, real_words.slots_gap):
        assert measure(model, ids, 3, left=3) < 1e-5, measure.__name__
        assert measure(model, ids, 3, left=2, right=1) < 1e-5, measure.__name__
        assert measure(model, ids, 3, left=2, positions=True) < 1e-5, measure.__name__


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(list(MODELS)), st.integers(0, 4), st.integers(0, 2), st.booleans(), st.booleans())
@torch.no_grad()
def test_a_row_with_an_adapter_does_not_depend_on_its_padding(name, left, right, positions, trained):
    model, ids = _model(name), zoo.text(1, 7)
    with softhooks.attach(model, softhooks.LlamaAdapter(3)) as prompt:
        for parameter in prompt.parameters() if trained else ():
            parameter.normal_(std=0.5)
        batch = _padded(ids, left, right)
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found = model(**batch).logits[:, left : left + 7]
        torch.testing.assert_close(found, model(**_padded(ids, 0, 0)).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_that_a_decoder_does_not_take_leave_an_adapter_as_the_mask_alone_does():
    config = tf.BartConfig(
        vocab_size=160, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=2,
        encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    model, ids = tf.BartForCausalLM(config).eval(), zoo.text(1, 7)
    with softhooks.attach(model, softhooks.LlamaAdapter(3)):
        batch = _padded(ids, 3, 0)
        expected = model(**_padded(ids, 0, 0)).logits
        for more in ({}, {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}):
            found = model(**batch, **more).logits[:, 3:]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generation_does_not_depend_on_padding(name):
    model, ids = _model(name), zoo.text(1, 7)
    for method, injection in (
        (softhooks.PromptTuning(3, init="random"), None),
        (softhooks.PromptTuning(3, init="random"), "slots"),
        (softhooks.PrefixTuning(3, init="random"), None),
        (softhooks.LlamaAdapter(3), None),
    ):
        with softhooks.attach(model, method, injection=injection) as prompt:
            for parameter in prompt.parameters():
                parameter.normal_(std=0.5)
            alone = model.generate(**_padded(ids, 0, 0), max_new_tokens=4, do_sample=False)[:, 7:]
            padded = model.generate(**_padded(ids, 3, 0), max_new_tokens=4, do_sample=False)[:, 10:]
            assert torch.equal(alone, padded), (method.kind, injection)


@torch.no_grad()
def test_decoding_without_positions_goes_on_where_the_text_ends():
    model, ids = _model("gemma3"), zoo.text(1, 8)
    with softhooks.attach(model, softhooks.PrefixTuning(3, init="random")) as prompt:
        for parameter in prompt.parameters():
            parameter.normal_(std=0.5)
        whole = model(**_padded(ids, 3, 0)).logits[:, -2:]
        batch = _padded(ids, 3, 0)
        first = model(
            input_ids=batch["input_ids"][:, :-2], attention_mask=batch["attention_mask"][:, :-2], use_cache=True
        )
        later = model(
            input_ids=ids[:, -2:], attention_mask=batch["attention_mask"], past_key_values=first.past_key_values
        )
    torch.testing.assert_close(later.logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positional", [False, True])
@torch.no_grad()
def test_positions_that_the_caller_gives_are_the_callers(positional):
    """Positions given by the caller are used as they are."""
    model, ids = zoo.build("gpt2"), zoo.text(1, 6)
    columns = torch.arange(4, 10)[None]
    with softhooks.attach(model, softhooks.PromptTuning(3, init="random")):
        batch = _padded(ids, 4, 0)
        by_column = torch.cat([torch.zeros(1, 4, dtype=torch.long), columns], 1)
        if positional:
            found = model(batch["input_ids"], None, batch["attention_mask"], None, by_column).logits[:, 4:]
        else:
            found = model(**batch, position_ids=by_column).logits[:, 4:]
        torch.testing.assert_close(found, model(input_ids=ids, position_ids=columns).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_adapter_with_closed_gates_is_the_base_bit_for_bit():
    for name in MODELS:
        model, ids = _model(name), zoo.text(2, 7)
        bare = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with softhooks.attach(model, softhooks.LlamaAdapter(3)):
            assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, bare), name


@torch.no_grad()
def test_a_prompt_moves_along_with_a_text_that_starts_elsewhere():
    """Equal to slots, and to its rows before the text, at the positions from there on."""
    for name in ("gpt2", "llama"):
        model, ids = zoo.build(name), zoo.text(2, 6)
        there = torch.arange(4, 10)[None]
        with softhooks.attach(model, softhooks.PromptTuning(3, init="random")) as prompt:
            assert prompt.injection == "shared"
            found = model(input_ids=ids, position_ids=there).logits
            with softhooks.disabled(model):
                words = model.get_input_embeddings()(ids)
                rows = torch.cat([prompt.embeddings().expand(2, -1, -1), words], 1)
                expected = model(inputs_embeds=rows, position_ids=torch.arange(4, 13)[None]).logits[:, 3:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prefix_is_refused_before_a_text_that_starts_elsewhere():
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, softhooks.PrefixTuning(3, init="random")):
        model(input_ids=ids, position_ids=torch.arange(6)[None])
        with pytest.raises(softhooks.UnsupportedModeError, match="position_ids that start at 4"):
            model(input_ids=ids, position_ids=torch.arange(4, 10)[None])
        cached = model(input_ids=ids[:, :4], use_cache=True)
        model(input_ids=ids[:, 4:], past_key_values=cached.past_key_values, position_ids=torch.arange(4, 6)[None])
