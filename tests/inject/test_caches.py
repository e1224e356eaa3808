"""A cache, and a copy of it, serves the prompts that it was filled with, and is refused with any others."""

from __future__ import annotations

import copy
from typing import Any

import naive
import pytest
import torch
import zoo
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

import softhooks
from softhooks import PrefixTuning, PromptTuning, UnsupportedModeError

P, NEW = 4, 5
READ, MORE = zoo.text(1, 7, seed=7)[0], zoo.text(1, 3, seed=8)[0]
WAYS = {
    "prompt": (PromptTuning(P), None),
    "prefix": (PrefixTuning(P), None),
    "slots": (PromptTuning(P), "slots"),
    "after-first": (PromptTuning(P, placement="after_first"), None),
}
ARCHS = ["llama", "gpt2", "gemma3", "gptj", "bloom"]


def attach(model: Any, way: str, name: str = "default") -> Any:
    method, injection = WAYS[way]
    return softhooks.attach(model, method, name, injection=injection)


def read(model: Any) -> Any:
    """The cache of a text."""
    return model(READ[None], use_cache=True).past_key_values


def go_on(model: Any, cache: Any) -> Tensor:
    """The logits of more text after a cache."""
    return model(MORE[None], past_key_values=cache).logits[0, -1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_text_read_once_and_copied_for_each_question(arch: str, way: str) -> None:
    model, bare = zoo.build(arch), zoo.build(arch)
    with torch.no_grad(), attach(model, way) as prompt:
        cache, step = read(model), naive.step_of(bare, prompt)
        expected = step(torch.cat([READ, MORE]))
        for _ in range(2):
            torch.testing.assert_close(go_on(model, copy.deepcopy(cache)), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_that_was_filled_without_the_prompt(arch: str, way: str) -> None:
    model = naive.endless(zoo.build(arch))
    with torch.no_grad():
        before = read(model)
        with attach(model, way):
            with softhooks.disabled(model):
                off = read(model)
                go_on(model, copy.deepcopy(off))
                go_on(model, copy.deepcopy(before))
            message = r"only be used with the same prompts(.|\n)*filled: *without a prompt\nnow: *with 'default'\nActivate the"
            for cache in (before, off, copy.deepcopy(off)):
                held = cache.get_seq_length()
                with pytest.raises(UnsupportedModeError, match=message):
                    go_on(model, cache)
                with pytest.raises(UnsupportedModeError, match=message):
                    model.generate(torch.cat([READ, MORE])[None], past_key_values=cache, max_new_tokens=2)
                assert cache.get_seq_length() == held
        go_on(model, off)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_that_was_filled_with_another_prompt_or_none(arch: str, way: str) -> None:
    model = zoo.build(arch)
    with torch.no_grad():
        attach(model, way, "en")
        attach(model, way, "de")
        cache = read(model)
        with (
            softhooks.disabled(model),
            pytest.raises(UnsupportedModeError, match=r"filled: with 'de'\nnow: +without a prompt"),
        ):
            go_on(model, cache)
        softhooks.activate(model, "en")
        with pytest.raises(UnsupportedModeError, match=r"filled: with 'de'\nnow: +with 'en'"):
            go_on(model, cache)
        with softhooks.rows(model, ["en"]), pytest.raises(UnsupportedModeError, match="filled: with 'de'"):
            go_on(model, cache)
        with softhooks.rows(model, [None]), pytest.raises(UnsupportedModeError, match=r"now: +without a prompt"):
            go_on(model, cache)
        with softhooks.rows(model, ["de"]):  # is what was on
            go_on(model, cache)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
@pytest.mark.parametrize("way", ["prompt", "prefix", "after-first"])
def test_a_decoders_cache_that_was_filled_without_the_prompt(arch: str, way: str) -> None:
    model = zoo.build(arch, "seq2seq")
    method, _ = WAYS[way]
    with torch.no_grad(), softhooks.attach(model, method):
        call = {"input_ids": READ[None], "decoder_input_ids": MORE[None]}
        own = model(**call, use_cache=True).past_key_values
        with softhooks.disabled(model):
            off = model(**call, use_cache=True).past_key_values
        model(**call, past_key_values=own)
        with pytest.raises(UnsupportedModeError, match="filled: without a prompt"):
            model(**call, past_key_values=off)


@pytest.mark.parametrize("way", ["prompt", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_static_cache_that_is_reset_for_another_prompt(arch: str, way: str) -> None:
    """As `generate` does with its own cache."""
    model, bare = zoo.build(arch), zoo.build(arch)
    with torch.no_grad():
        prompts = {name: attach(model, way, name) for name in ("en", "de")}
        cache = StaticCache(config=model.config, max_cache_len=32)
        for name in ("en", "de", "en"):
            softhooks.activate(model, name)
            cache.reset()
            model(READ[None], past_key_values=cache)
            expected = naive.step_of(bare, prompts[name])(torch.cat([READ, MORE]))
            torch.testing.assert_close(go_on(model, cache), expected, rtol=1e-4, atol=5e-5)
        softhooks.activate(model, "de")
        with pytest.raises(UnsupportedModeError, match="filled: with 'en'"):
            go_on(model, cache)


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_prompts_in_turn_with_the_static_cache_that_generate_keeps(way: str) -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    prompts = {name: attach(model, way, name) for name in ("en", "de")}
    for name in ("en", "de", None, "en"):
        context = softhooks.disabled(model) if name is None else softhooks.rows(model, [name])
        with context:
            found = model.generate(READ[None], max_new_tokens=NEW, do_sample=False, cache_implementation="static")
        assert torch.equal(found[0], naive.greedy(naive.step_of(bare, prompts[name] if name else None), READ, NEW))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_cache_is_anyones(way: str) -> None:
    model, cache = zoo.build("llama"), DynamicCache()
    with torch.no_grad():
        attach(model, way, "en")
        attach(model, way, "de")
        for name in ("en", "de"):
            softhooks.activate(model, name)
            fresh = copy.deepcopy(cache)
            model(READ[None], past_key_values=fresh)
            go_on(model, fresh)


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_a_static_cache_and_a_compiled_forward(way: str) -> None:
    """`generate` does this by itself on a GPU."""
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    rows = [READ, MORE]
    with attach(model, way) as prompt:
        found = model.generate(
            **naive.left_padded(rows),
            max_new_tokens=NEW,
            do_sample=False,
            cache_implementation="static",
            compile_config=compiled,
        )
    assert hasattr(model, "_compiled_call"), "nothing was compiled"
    step = naive.step_of(bare, prompt)
    for ours, row in zip(found, rows, strict=True):
        assert torch.equal(ours[-len(row) - NEW :], naive.greedy(step, row, NEW))
    torch._dynamo.reset()
