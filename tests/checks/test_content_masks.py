"""Prefixes in models that make their masks of the text's own keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import real_words
import tiny_models as models
import torch
import transformers as tf
import zoo

import softhooks
from softhooks import Cartridge, ContextTuning, PrefixTuning, PTuningV2, UnsupportedMethodError

_SIZES: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": zoo.PAD, "max_position_embeddings": 64,
}  # fmt: skip
_METHODS = (
    PrefixTuning(3),
    PTuningV2(3),
    ContextTuning(demonstrations=[[5, 6, 7]]),
    Cartridge(3, document=[5, 6, 7, 8], distill=False),
)


@torch.no_grad()
def _wide(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("method", _METHODS, ids=lambda method: method.kind)
def test_a_prefix_is_refused_where_masks_are_made_of_values(method: Any) -> None:
    """Doge adds a function of each key's value to its scores, which a prefix would lack."""
    model = _wide(tf.DogeForCausalLM(tf.DogeConfig(**_SIZES)))
    with pytest.raises(UnsupportedMethodError, match="masks that do not depend on the text"):
        softhooks.attach(model, method)
    assert real_words.front_gap(model, zoo.text(1, 12), 4) < 1e-5  # what the message recommends


@pytest.mark.parametrize(
    ("arch", "changes"), [("deepseek_v32", {"index_topk": 2048}), ("deepseek_v32", {}), ("qwen4_exp_text", {})], ids=str
)
def test_a_prefix_is_refused_where_keys_are_selected_also_if_a_short_text_has_fewer(
    arch: str, changes: dict[str, Any]
) -> None:
    model = models.build(arch, "causal", **changes)
    with pytest.raises(UnsupportedMethodError, match="masks that do not depend on the text"):
        softhooks.attach(model, PrefixTuning(3))


def test_experts_may_be_selected() -> None:
    model = models.build("mixtral", "causal", num_experts_per_tok=4)
    assert model.config.num_local_experts == 4
    softhooks.attach(model, PrefixTuning(3)).remove()


def test_a_model_whose_self_attention_reads_an_encoders_states_is_refused() -> None:
    """BigBird passes the encoder's states to its self-attention too."""
    config = tf.BigBirdConfig(**_SIZES, is_decoder=True, add_cross_attention=True, attention_type="original_full")
    model = tf.BigBirdForCausalLM(config).eval()
    ids, states = zoo.text(2, 5), torch.randn(2, 4, 32)
    with softhooks.attach(model, PrefixTuning(3)):
        model(ids)
        with pytest.raises(softhooks.UnsupportedModeError, match="called with encoder or query states"):
            model(ids, encoder_hidden_states=states)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral", "bert", "t5", "bart"])
def test_other_models_have_the_same_masks_for_every_text(arch: str) -> None:
    model = zoo.build(arch, "seq2seq" if arch in ("t5", "bart") else "masked" if arch == "bert" else "causal").eval()
    softhooks.attach(model, PrefixTuning(3)).remove()


def test_a_model_that_scales_its_embeddings_in_place_takes_a_prefix() -> None:
    """CTRL scales its embedding's output in place, which torch forbids for leaf tensors with gradients."""
    config = tf.CTRLConfig(vocab_size=zoo.VOCABULARY, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64)
    model = _wide(tf.CTRLLMHeadModel(config))
    assert real_words.prefix_gap(model, zoo.text(1, 12), 3, left=2) < 1e-5
