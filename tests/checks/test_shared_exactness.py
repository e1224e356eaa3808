"""The comparison at attach of a shared prompt with slots: which differences pass, and which do not."""

from __future__ import annotations

from typing import Any

import cross
import pytest
import torch
import transformers as tf
import zoo

import softhooks
from softhooks import PromptTuning
from softhooks.checks.shared_exactness import agree
from softhooks.errors import UnsupportedModeError
from softhooks.runtime import dispatch

LENGTH = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_difference_as_large_as_the_prompts_effect_is_no_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    without, effect = (torch.randn(40, 32, generator=generator) for _ in range(2))
    theirs, precision = without + 0.3 * effect, torch.finfo(dtype).eps
    noise = torch.randn(40, 32, generator=generator) * precision
    assert agree(theirs + noise, theirs, without, precision)
    assert not agree(without, theirs, without, precision)
    assert not agree(theirs + 0.1 * effect, theirs, without, precision)
    assert not agree(torch.full_like(theirs, torch.nan), theirs, without, precision)
    assert not agree(theirs, torch.full_like(theirs, torch.nan), without, precision)


def test_ways_that_cannot_be_compared_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedModeError("slots do not run here")

    original = dispatch._open_slots
    calls: list[int] = []

    def fail_in_the_comparison(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return refuse() if len(calls) <= 2 else original(*args, **kwargs)  # through the model, and at the stack

    monkeypatch.setattr(dispatch, "_open_slots", fail_in_the_comparison)
    assert softhooks.attach(zoo.build("llama"), PromptTuning(LENGTH)).injection == "slots"
    assert len(calls) > 2


def _llama4() -> Any:
    config = tf.Llama4TextConfig(
        **zoo.SMALL, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
        num_experts_per_tok=1, attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.Llama4ForCausalLM(config).eval()


@torch.no_grad()
def test_a_prompt_before_chunks_stands_in_the_sequence() -> None:
    model, bare = _llama4(), _llama4()
    for one in (model, bare):
        torch.manual_seed(1)
        for parameter in one.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    prompt = softhooks.attach(model, PromptTuning(LENGTH))
    assert prompt.injection == "slots"
    ids = zoo.text(1, 20)
    want = cross.by_hand(bare, ids, prompt.embeddings())
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


def test_a_model_that_selects_its_keys_takes_slots_however_many_it_selects() -> None:
    model = zoo.build("llama")
    model.config.index_topk = 2048  # more than a probe has columns
    assert softhooks.attach(model, PromptTuning(LENGTH)).injection == "slots"
