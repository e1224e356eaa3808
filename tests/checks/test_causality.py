"""With any prompt, tokens see what they see without it: nothing later in a decoder, the whole text in an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor
from transformers import AttentionInterface

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning
from softhooks.backbone.probe_inputs import longest_distance, probe_length
from softhooks.errors import UnsupportedMethodError
from softhooks.method import Method

METHODS: dict[str, Callable[[], Method]] = {
    "prefix": lambda: PrefixTuning(5, init="random"),
    "front": lambda: PromptTuning(5),
    "after_first": lambda: PromptTuning(5, placement="after_first"),
    "branch": lambda: LlamaAdapter(5),
}


def _wide(model: Any) -> Any:
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4 if "embed" in path else 0.2)
    return model.eval()


def _splinter() -> Any:
    return _wide(tf.SplinterModel(tf.SplinterConfig(**zoo.SMALL)))


@torch.no_grad()
def _reach(model: Any, columns: int = 9, changed: int = 5) -> Tensor:
    """The change of each token's state when one token changes, [T]."""
    ids = zoo.text(1, columns)
    other = ids.clone()
    other[0, changed] = 4 + (ids[0, changed] - 3) % 50
    return (model(ids).last_hidden_state - model(other).last_hidden_state).abs().amax(-1)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arch", "attention"),
    [("splinter", "eager")]
    + [
        (arch, attention)
        for arch in ("bert", "roberta", "albert", "modernbert", "llama", "gpt2", "gemma3")
        for attention in ("eager", "sdpa")
    ],
)
def test_tokens_see_those_that_they_see_without_a_prompt(arch: str, attention: str, method: str) -> None:
    model = _base(arch, attention) if arch != "splinter" else _splinter()
    bare = _reach(model) > 1e-6
    softhooks.attach(model, METHODS[method]())
    with_prompt = _reach(model) > 1e-6
    if arch == "modernbert" and method == "after_first":  # the first token is farther from the others now
        bare, with_prompt = bare[1:], with_prompt[1:]
    assert with_prompt.tolist() == bare.tolist()


def _base(arch: str, attention: str) -> Any:
    torch.manual_seed(0)
    return _wide(tf.AutoModel.from_config(zoo.CONFIGS[arch](), attn_implementation=attention))


@torch.no_grad()
def test_padding_says_nothing_to_an_encoder_whose_attention_gets_no_mask() -> None:
    model = _splinter()
    softhooks.attach(model, PrefixTuning(5, init="random"))
    ids = zoo.text(2, 8)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 8), torch.zeros(2, 3)], 1).long()
    got = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :8]
    torch.testing.assert_close(got, model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def _everything(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> Any:
    """An unknown attention function: without a mask every query sees every key."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def test_an_attention_function_of_ones_own_is_taken_for_what_it_does() -> None:
    AttentionInterface.register("everything", _everything)
    try:
        model = _splinter()
        model.set_attn_implementation("everything")
        assert _reach(model)[0] > 1e-3
        softhooks.attach(model, PrefixTuning(5, init="random"))
        assert _reach(model)[0] > 1e-3
    finally:
        AttentionInterface._global_mapping.pop("everything", None)


# --- refused ----------------------------------------------------------------------------------------------------------


def _deepseek_v4(rate: int) -> Any:
    config = tf.DeepseekV4Config(
        **{**zoo.SMALL, "num_attention_heads": 4, "max_position_embeddings": 128}, num_key_value_heads=1, head_dim=16,
        q_lora_rank=16, o_lora_rank=16, o_groups=2, index_n_heads=2, index_head_dim=16, index_topk=64,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, num_hash_layers=0,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"], sliding_window=8,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": rate},
        partial_rotary_factor=0.5, hc_mult=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4 if "embed" in path else 0.2)
    return model


@pytest.mark.parametrize("rate", [8, 16])
def test_a_prefix_that_lets_the_future_in_is_refused_at_attach(rate: int) -> None:
    model = _deepseek_v4(rate)
    before = _logits_reach(model)
    assert before[:5].max() < 1e-6
    with pytest.raises(UnsupportedMethodError, match="earlier tokens of a causal model depend on later tokens"):
        softhooks.attach(model, PrefixTuning(5, init="random"))
    torch.testing.assert_close(_logits_reach(model), before, rtol=0, atol=0)
    prompt = softhooks.attach(model, PromptTuning(5))  # what the message says to use
    assert prompt.injection == "slots"
    assert _logits_reach(model)[:5].max() < 1e-5


@torch.no_grad()
def _logits_reach(model: Any) -> Tensor:
    ids = zoo.text(1, 20)
    other = ids.clone()
    other[0, 5:] = zoo.text(1, 20, seed=1)[0, 5:]
    return (model(ids).logits - model(other).logits).abs().amax(-1)[0]


# --- how long a probe is ----------------------------------------------------------------------------------------------


class _Holder(torch.nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.__dict__.update(values)


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ({}, 8),
        ({"sliding_window": 4096}, 8),
        ({"sliding_window": 16}, 16),
        ({"compress_rates": {"a": 4, "b": 128}}, 128),
        ({"attention_chunk_size": 12}, 24),
        ({"conv_kernel_size": [3, 5]}, 120),
        ({"use_sliding_window": True, "window": None}, 8),
    ],
)
def test_a_probe_is_longer_than_the_distances_that_a_config_names(values: dict[str, Any], reach: int) -> None:
    module = _Holder(**values)
    assert longest_distance(module) == reach
    columns, cut = probe_length(module, None)
    assert columns > 2 * reach
    assert (cut + 1) % reach == 0
    for room in (2, 5, 11):
        columns, cut = probe_length(module, room)
        assert columns == room
        assert 1 <= cut < room
