"""Layers that compute only the last columns of a text (Gemma 4 with shared keys) see the prompt as others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo

import softhooks

METHODS = {
    "prompt": lambda: (softhooks.PromptTuning(5, init="random"), None),
    "slots": lambda: (softhooks.PromptTuning(5, init="random"), "slots"),
    "after-first": lambda: (softhooks.PromptTuning(5, init="random", placement="after_first"), None),
    "prefix": lambda: (softhooks.PrefixTuning(5, init="random"), None),
}


def _model(window: int = 512, attention: str = "sdpa", **more: Any) -> Any:
    config = tf.Gemma4TextConfig(
        vocab_size=zoo.VOCABULARY, vocab_size_per_layer_input=zoo.VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=4,
        sliding_window=window, layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=2, pad_token_id=0,
        eos_token_id=1, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Gemma4ForCausalLM._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def _attached(model: Any, name: str) -> Any:
    method, injection = METHODS[name]()
    prompt = softhooks.attach(model, method, injection=injection)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_(std=0.5)
    return prompt


def _batch(side: str) -> dict[str, torch.Tensor]:
    ids, mask = zoo.text(2, 12), torch.ones(2, 12, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [4, 512])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_last_logits_are_the_last_of_all_logits(name, window, attention):
    model = _model(window, attention)
    with _attached(model, name):
        for side in ("none", "left", "right"):
            batch = _batch(side)
            whole = model(**batch, use_cache=False).logits
            for keep in (1, 3, 12):
                torch.testing.assert_close(
                    model(**batch, logits_to_keep=keep).logits, whole[:, -keep:], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("window", [4, 512])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_generation_is_what_logits_say(name, window):
    model = _model(window)
    model.generation_config.eos_token_id = None
    with _attached(model, name):
        for side in ("none", "left"):
            batch = _batch(side)
            found = model.generate(**batch, max_new_tokens=4, do_sample=False)
            for _ in range(4):
                best = model(**batch, use_cache=False).logits[:, -1:].argmax(-1)
                one = torch.ones_like(best)
                batch = {
                    "input_ids": torch.cat([batch["input_ids"], best], 1),
                    "attention_mask": torch.cat([batch["attention_mask"], one], 1),
                }
            assert torch.equal(found, batch["input_ids"])


@torch.no_grad()
def test_a_static_cache_generates_the_same():
    model = _model()
    model.generation_config.eos_token_id = None
    batch = _batch("left")
    for name in ("prompt", "prefix"):
        with _attached(model, name):
            dynamic = model.generate(**batch, max_new_tokens=4, do_sample=False)
            static = model.generate(**batch, max_new_tokens=4, do_sample=False, cache_implementation="static")
            assert torch.equal(dynamic, static), name


@torch.no_grad()
def test_packed_documents_keep_apart_in_layers_asked_for_the_last_column():
    model = _model()
    ids = zoo.text(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with _attached(model, "prefix"):
        whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        last = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        alone = model(input_ids=ids[:, 5:], use_cache=False).logits
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[:, 5:], alone, atol=1e-4, rtol=1e-4)
