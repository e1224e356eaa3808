"""LLaMA-Adapter in every mode of generation, in packed rows, with other attention functions and architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import adapters
import naive
import pytest
import torch
import transformers as tf
import zoo
from flash import NAME, flash_emulated_forward
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter

K, NEW = 3, 6
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4)]
METHOD = LlamaAdapter(K, gate="raw")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def prompted(arch: str) -> tuple[Any, Any, naive.Step]:
    """A frozen model with an adapter of nonzero gates, and its naive decoding step."""
    model = naive.endless(zoo.build(arch)).requires_grad_(False)
    bare = zoo.build(arch).requires_grad_(False)
    prompt = adapters.stir(softhooks.attach(model, METHOD), 2.0)
    tables = dict(prompt.encoder.named_parameters())

    def step(row: Tensor) -> Tensor:
        with adapters.patched(adapters.branches(bare, tables, METHOD)):
            return bare(row[None], use_cache=False).logits[0, -1]

    return model, prompt, step


@pytest.mark.parametrize("attention", ["sdpa", NAME])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "opt", "mixtral"])
def test_every_way_of_generating(arch: str, attention: str) -> None:
    AttentionInterface.register(NAME, flash_emulated_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    try:
        model, _, step = prompted(arch)
        model.set_attn_implementation(attention)
        expected = [naive.greedy(step, row, NEW) for row in ROWS]
        batch, one = naive.left_padded(ROWS), {"input_ids": ROWS[0][None]}
        for call in (
            batch,
            {**batch, "use_cache": False},
            {**batch, "prefill_chunk_size": 3},
            {**one, "assistant_model": naive.endless(zoo.build(arch, seed=1))},
            {**one, "prompt_lookup_num_tokens": 2},
            *([{**batch, "cache_implementation": "static"}] if attention == "sdpa" else []),
        ):
            found = model.generate(**call, max_new_tokens=NEW, do_sample=False)
            for ours, right in zip(found, expected, strict=False):
                assert torch.equal(ours[-len(right) :], right), call.keys()
        with softhooks.disabled(model):
            assert not torch.equal(found, model.generate(**call, max_new_tokens=NEW, do_sample=False))
    finally:
        remove_all()
        del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_beams_and_samples(arch: str) -> None:
    model, _, step = prompted(arch)
    batch = naive.left_padded(ROWS)
    beams = model.generate(**batch, max_new_tokens=NEW, do_sample=False, num_beams=3)
    for ours, row in zip(beams, ROWS, strict=True):
        assert torch.equal(ours[-len(row) - NEW :], naive.beam(step, row, 3, NEW))
    torch.manual_seed(5)
    drawn = model.generate(**batch, max_new_tokens=NEW, do_sample=True, top_k=0, num_return_sequences=2)
    twice = [row for row in ROWS for _ in range(2)]
    for ours, right in zip(drawn, naive.sample([step] * 4, twice, NEW, seed=5), strict=True):
        assert torch.equal(ours[-len(right) :], right)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_continuing_from_a_returned_cache(arch: str) -> None:
    model, _, step = prompted(arch)
    first = model(ROWS[0][None, :4], use_cache=True)
    last = model(ROWS[0][None, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(last.logits[0, -1], step(ROWS[0]), **CLOSE)
    assert last.past_key_values.get_seq_length() == len(ROWS[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "gemma3", "mistral"])
@torch.no_grad()
def test_packed_documents_each_see_the_adapter_and_no_other_document(arch: str) -> None:
    """A packed row with restarting positions equals its documents alone, which PEFT gets wrong."""
    model, _, step = prompted(arch)
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    logits = model(torch.cat(ROWS)[None], position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(logits[len(ROWS[0]) - 1], step(ROWS[0]), **CLOSE)
    torch.testing.assert_close(logits[-1], step(ROWS[1]), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", zoo.CAUSAL)
@torch.no_grad()
def test_positions_come_from_the_mask(arch: str, side: str) -> None:
    """A query depends on its absolute position, so a branch is sensitive to padding where the bare model is not."""
    model, _, step = prompted(arch)
    row, padding = ROWS[1], torch.zeros(3, dtype=torch.long)
    parts = [padding, row] if side == "left" else [row, padding]
    mask = torch.cat([torch.full_like(part, part is row) for part in parts])
    logits = model(torch.cat(parts)[None], attention_mask=mask[None]).logits[0][mask.bool()]
    torch.testing.assert_close(logits[-1], step(row), **CLOSE)


# --- other architectures ----------------------------------------------------------------------------------------------

GQA: dict[str, Any] = {**zoo.SMALL, "num_key_value_heads": 2}
MORE: dict[str, Callable[[], Any]] = {
    "fused projections": lambda: tf.Phi3Config(**GQA),
    "rotation of a part": lambda: tf.GPTNeoXConfig(**zoo.SMALL),
    "norms over all heads": lambda: tf.Olmo2Config(**GQA),
    "sinks": lambda: tf.GptOssConfig(
        **GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"]
    ),
    "low rank": lambda: tf.DeepseekV3Config(
        **{**zoo.SMALL, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "complex rotation": lambda: tf.Llama4TextConfig(
        **GQA, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attn_temperature_tuning=True
    ),
    "gated output": lambda: tf.Qwen3NextConfig(
        **GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "scaled rotation": lambda: tf.LlamaConfig(
        **GQA, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_other_kinds_of_attention(name: str) -> None:
    """Equal to the base at step 0; then gradients reach every row and gate, and rows of the batch do not mix."""
    torch.manual_seed(0)
    config = MORE[name]()
    attention = "eager" if name == "sinks" else "sdpa"
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    ids = zoo.text(2, 7)
    bare = model(ids).logits
    with softhooks.attach(model, METHOD) as prompt:
        assert torch.equal(model(ids).logits, bare)
        adapters.stir(prompt)
        logits = model(ids).logits
        assert not torch.allclose(logits, bare, atol=1e-5)
        torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **CLOSE)
        logits.square().sum().backward()
        for parameter in prompt.encoder.parameters():
            assert bool((parameter.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("arch", [*zoo.MORE_ENCODERS, *zoo.RARE_ENCODERS])
def test_other_encoders(arch: str) -> None:
    """Also one layer that runs three times, with rows for each run, and inline attention."""
    model, ids = zoo.build(arch, "masked").requires_grad_(False), zoo.text(3, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    bare = model(ids, attention_mask=mask).logits[mask.bool()]
    with softhooks.attach(model, METHOD) as prompt:
        start = model(ids, attention_mask=mask).logits[mask.bool()]
        if arch in zoo.WRITTEN_OUT:
            torch.testing.assert_close(start, bare, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(start, bare)
        adapters.stir(prompt)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        assert not torch.allclose(logits, bare, atol=0.1)
        logits.square().sum().backward()
        for parameter in prompt.encoder.parameters():
            assert bool((parameter.grad.abs().sum(-1) > 0).all())
        layers = model.config.num_hidden_layers
        assert prompt.encoder.text_gates.shape == (1, layers * 4)
        alone = torch.cat([model(ids[row : row + 1, :length]).logits[0] for row, length in ((0, 7), (1, 5), (2, 7))])
    torch.testing.assert_close(logits, alone, **CLOSE)


def test_a_scale_on_rotated_keys_is_no_part_of_the_projection() -> None:
    """YaRN scales what it rotates, the rows are not rotated: keys are the projection and nothing else."""
    from softhooks.inject.branch.projections import keys_and_values

    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MORE["scaled rotation"]()).eval().requires_grad_(False)
    assert model.model.rotary_emb.attention_scaling > 1.05
    with softhooks.attach(model, METHOD) as prompt:
        rows = torch.randn(K, 32)
        keys, values = keys_and_values(prompt.prompted_model.structure.entry.sites[1], rows)
        attention = model.model.layers[1].self_attn
    torch.testing.assert_close(keys, attention.k_proj(rows).view(K, 2, 8))
    torch.testing.assert_close(values, attention.v_proj(rows).view(K, 2, 8))
