"""Prompts in models with recurrent layers, alone or next to attention: exact in the sequence and in generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import naive
import oracles
import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import PromptTuning, UnsupportedModeError

P, NEW = 4, 5
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
IDS: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": zoo.PAD, "bos_token_id": zoo.BOS,
    "eos_token_id": zoo.EOS,
}  # fmt: skip
ATTENTION: dict[str, Any] = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}

CONFIGS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: tf.MambaConfig(**IDS, state_size=4, intermediate_size=64),
    "mamba2": lambda: tf.Mamba2Config(**IDS, state_size=8, num_heads=8, head_dim=8, n_groups=2, expand=2),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**IDS, state_size=4, intermediate_size=64),
    "jamba": lambda: tf.JambaConfig(
        **IDS, **ATTENTION, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "bamba": lambda: tf.BambaConfig(**IDS, **ATTENTION, **MAMBA2, attn_layer_indices=[1]),
    "lfm2": lambda: tf.Lfm2Config(**IDS, **ATTENTION, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **IDS, **ATTENTION, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
PURE = ("mamba", "mamba2", "falcon_mamba")
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 2)]


@cache
def model_of(arch: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[arch]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.2)
    return naive.endless(model)


def alone(model: Any, row: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """The logits of one row, with the prompt's rows inserted into its embeddings by hand. -> [T, V]"""
    with softhooks.disabled(model):
        if table is None:
            return model(row[None]).logits[0]
        return oracles.prompted(model, row[None], table, placement, causal=True)[0]


def decoded(model: Any, row: Tensor, table: Tensor | None, placement: str) -> Tensor:
    """Greedy decoding with a full forward per token."""
    for _ in range(NEW):
        row = torch.cat([row, alone(model, row, table, placement)[-1].argmax()[None]])
    return row


@pytest.mark.parametrize("placement", ["front", "after_first"])
@pytest.mark.parametrize("arch", CONFIGS)
@torch.no_grad()
def test_forward_and_generation_are_those_of_the_prompt_put_in_by_hand(arch: str, placement: Any) -> None:
    model, batch = model_of(arch), naive.left_padded(ROWS)
    with softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        table = prompt.encoder("embeddings")
        logits = model(**batch).logits
        for number, row in enumerate(ROWS):
            own = logits[number, -len(row) :]
            torch.testing.assert_close(own, alone(model, row, table, placement), **CLOSE)
        for use_cache in (True, False):
            found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
            for number, row in enumerate(ROWS):
                kept = found[number, batch["input_ids"].shape[1] - len(row) :]
                assert torch.equal(kept, decoded(model, row, table, placement)), (number, use_cache)


@pytest.mark.parametrize("arch", CONFIGS)
@torch.no_grad()
def test_rows_with_prompts_of_different_lengths(arch: str) -> None:
    model, batch = model_of(arch), naive.left_padded(ROWS)
    with (
        softhooks.attach(model, PromptTuning(2), "a", injection="slots") as a,
        softhooks.attach(model, PromptTuning(5), "b", injection="slots") as b,
    ):
        tables = [a.encoder("embeddings"), None, b.encoder("embeddings")]
        with softhooks.rows(model, ["a", None, "b"]):
            logits = model(**batch).logits
            found = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        for number, (row, table) in enumerate(zip(ROWS, tables, strict=True)):
            torch.testing.assert_close(logits[number, -len(row) :], alone(model, row, table, "front"), **CLOSE)
            kept = found[number, batch["input_ids"].shape[1] - len(row) :]
            assert torch.equal(kept, decoded(model, row, table, "front"))


@pytest.mark.parametrize("arch", PURE)
@torch.no_grad()
def test_a_state_that_was_filled_without_the_prompt_is_refused(arch: str) -> None:
    model = model_of(arch)
    first = model(ROWS[0][None], use_cache=True)
    with softhooks.attach(model, PromptTuning(P)), pytest.raises(UnsupportedModeError):
        model(ROWS[0][None, :1], cache_params=first.cache_params, use_cache=True)


def test_a_state_that_cannot_tell_what_it_holds_is_refused() -> None:
    config = tf.RwkvConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), softhooks.attach(model, PromptTuning(P)):
        assert model(ROWS[0][None]).logits.shape == (1, 7, zoo.VOCABULARY)
        with pytest.raises(UnsupportedModeError, match="state"):
            model.generate(ROWS[0][None], max_new_tokens=NEW, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch not in PURE])
@torch.no_grad()
def test_an_offset_of_an_adapter_moves_no_padding_that_recurrent_layers_read(arch: str) -> None:
    model, batch = model_of(arch), naive.left_padded(ROWS)
    with softhooks.attach(model, softhooks.LlamaAdapter(P, scale_and_bias=True)) as prompt:
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        alone = [model(row[None]).logits[0] for row in ROWS]
        for number, own in enumerate(alone):
            torch.testing.assert_close(model(**batch).logits[number, -len(own) :], own, **CLOSE)
        found = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        for number, row in enumerate(ROWS):
            kept = found[number, batch["input_ids"].shape[1] - len(row) :]
            whole = model.generate(row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=NEW)[0]
            assert torch.equal(kept, whole)
