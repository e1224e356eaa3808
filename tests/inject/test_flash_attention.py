"""Flash attention's contract, emulated: a 2D mask or none, causal from the lower right, windows of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import naive
import pytest
import torch
import zoo
from flash import NAME, flash_emulated_forward
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning, PTuningV2, UnsupportedModeError

P, NEW = 4, 6
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4)]
WAYS = {"prompt": (PromptTuning(P), None), "prefix": (PrefixTuning(P), None), "slots": (PromptTuning(P), "slots")}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    remove_all()
    AttentionInterface.register(NAME, flash_emulated_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield
    remove_all()
    del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]


def emulated(arch: str) -> Any:
    model = naive.endless(zoo.build(arch))
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "opt", "mixtral"])
def test_generation(arch: str, way: str) -> None:
    model, bare = emulated(arch), naive.endless(zoo.build(arch))
    method, injection = WAYS[way]
    prompt = softhooks.attach(model, method, injection=injection)
    step = naive.step_of(bare, prompt)
    expected = [naive.greedy(step, row, NEW) for row in ROWS]
    batch, one = naive.left_padded(ROWS), {"input_ids": ROWS[0][None]}
    assistant = naive.endless(zoo.build(arch, seed=1))
    for call in (
        batch,
        {**batch, "use_cache": False},
        {**batch, "prefill_chunk_size": 3},
        {**one, "prefill_chunk_size": 3},
        {**one, "assistant_model": assistant},
        {**one, "prompt_lookup_num_tokens": 2},
    ):
        found = model.generate(**call, max_new_tokens=NEW, do_sample=False)
        for ours, right in zip(found, expected, strict=False):
            assert torch.equal(ours[-len(right) :], right), call.keys()


def test_training_gradients_are_those_of_sdpa() -> None:
    ids, gradients = zoo.text(2, 7), []
    for model in (zoo.build("llama"), emulated("llama")):
        torch.manual_seed(0)
        with softhooks.attach(model, PrefixTuning(P)) as prompt:
            model.train()(ids, labels=ids).loss.backward()
            gradients.append(prompt.encoder.text.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_what_flash_attention_cannot_show_is_refused() -> None:
    """A prefix that some queries do not see: in sliding windows, and in rows with prompts of different lengths."""
    model = emulated("mistral")
    with pytest.raises(
        UnsupportedModeError, match=r"with flash attention every token sees all of it(.|\n)*set_attn_implementation"
    ):
        softhooks.attach(model, PrefixTuning(P))
    model = emulated("llama")
    softhooks.attach(model, PrefixTuning(P), "long")
    softhooks.attach(model, PrefixTuning(2), "short")
    with (
        softhooks.rows(model, ["long", "short"]),
        pytest.raises(UnsupportedModeError, match="with flash attention every token sees all of it"),
    ):
        model(zoo.text(2, 6))
    with softhooks.rows(model, ["long", "long"]), torch.no_grad():
        together = model(zoo.text(2, 6)).logits
        softhooks.activate(model, "long")
    torch.testing.assert_close(together, model(zoo.text(2, 6)).logits.detach())


@pytest.mark.parametrize("arch", ["mistral", "modernbert"])
def test_a_prefix_that_is_seen_past_a_window_is_refused(arch: str) -> None:
    """Flash attention computes windows itself and would silently cut off the prefix."""
    model = zoo.build(arch, "sequence")
    model.set_attn_implementation(NAME)
    for method in (PTuningV2(P), PrefixTuning(P, windowed=False)):
        with pytest.raises(UnsupportedModeError, match=r"function flash_emulated_forward with windows"):
            softhooks.attach(model, method)
    with pytest.raises(
        UnsupportedModeError,
        match="with flash attention every token sees all of it" if arch == "mistral" else "with windows",
    ):
        softhooks.attach(model, PrefixTuning(P))


def test_deep_prompts_on_an_encoder_are_those_of_sdpa() -> None:
    logits = []
    for model in (zoo.build("bert", "tokens"), zoo.build("bert", "tokens")):
        if logits:
            model.set_attn_implementation(NAME)
        torch.manual_seed(0)
        with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
            prompt.encoder.eval().text.normal_()
            assert not prompt.prompted_model.structure.entry.causal
            logits.append(model(**naive.left_padded(ROWS)).logits[naive.left_padded(ROWS)["attention_mask"].bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_packed_documents_are_refused(way: str) -> None:
    method, injection = WAYS[way]
    model = emulated("llama")
    ids, positions = zoo.text(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with (
        softhooks.attach(model, method, injection=injection),
        pytest.raises(UnsupportedModeError, match="apart by itself"),
    ):
        model(ids, position_ids=positions, use_cache=False)
