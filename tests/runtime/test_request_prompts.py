"""Continuous batches whose requests use different prompts: each request gets what `generate` gives it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import table
import torch
import untouched
import zoo
from test_continuous_batching import SIZES, TEXTS, ask, assert_same, generated, greedy, served, wake
from transformers import ContinuousBatchingConfig, GenerationConfig

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.errors import NotAttachedError, OptionError, UnsupportedModeError
from softhooks.layout.layout import Layout

Methods = dict[str, Any]
PREFIXES: Methods = {"a": PromptTuning(5), "b": PrefixTuning(9), "c": PTuningV2(3, layers=[1])}
UNSHIFTED: Methods = {
    "a": PrefixTuning(4, shift_positions=False),
    "b": PTuningV2(9, windowed=True),
    "c": PromptTuning(9),
}
BRANCHES: Methods = {
    "a": LlamaAdapter(4, num_layers=1),
    "b": LlamaAdapter(6, scale_and_bias=True),
    "c": LlamaAdapter(3, gate="raw", gate_per="layer"),
}
NAMES = ["a", "b", None, "c"]


@pytest.fixture(autouse=True)
def _no_prompt_before() -> None:
    untouched.remove_all()


def prompted(arch: str = "llama", methods: Methods = PREFIXES, **options: Any) -> Any:
    model = zoo.build(arch, **options)
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        wake(softhooks.attach(model, method, name=name))
    return model


def alone(model: Any, texts: list[list[int]], names: list[str | None], new: int = 6) -> tuple[Any, torch.Tensor]:
    """What `generate` returns for each text alone, with its prompt."""
    tokens, logprobs = [], []
    for text, name in zip(texts, names, strict=True):
        with softhooks.rows(model, [name]):
            [one], scores = generated(model, [text], new=new)
        tokens.append(one)
        logprobs.append(scores)
    return tokens, torch.cat(logprobs)


CASES = [(arch, "sdpa", PREFIXES) for arch in ("llama", "gpt2", "gemma3", "mistral")]
CASES += [("llama", "eager", PREFIXES), ("gemma3", "eager", PREFIXES), ("gemma3", "sdpa", UNSHIFTED)]
CASES += [("llama", "sdpa", UNSHIFTED), ("llama", "sdpa", BRANCHES), ("mistral", "eager", BRANCHES)]


@pytest.mark.parametrize(("arch", "attention", "methods"), CASES)
def test_every_request_gets_what_its_prompt_gives_it_alone(arch: str, attention: str, methods: Methods) -> None:
    model = prompted(arch, methods, attention=attention)
    expected = alone(model, TEXTS, NAMES)
    others = alone(model, TEXTS, ["b", "c", "a", None])
    assert (expected[1] - others[1]).abs().amax(-1).min() > 1e-3  # each text shows which prompt it has
    with softhooks.rows(model, NAMES):
        assert_same(served(model), expected)


@pytest.mark.parametrize("name", ["p-tuning", "prefix-mlp", "cpt", "residual", "context", "cartridge", "mpt"])
def test_other_methods_mix_with_a_prefix(name: str) -> None:
    model = prompted(methods={"a": PrefixTuning(3)})
    entry = table.BY_NAME[name]
    wake(softhooks.attach(model, entry.make(5), name="b"))
    names: list[str | None] = ["b", "a", "b", None]
    expected = alone(model, TEXTS, names)
    with softhooks.rows(model, names):
        assert_same(served(model), expected)


def test_one_prompt_or_none_for_all_requests() -> None:
    model = prompted()
    for names in (["b"] * 4, [None] * 4):
        expected = alone(model, TEXTS, names)
        with softhooks.rows(model, names):
            assert_same(served(model), expected)


def test_only_requests_with_the_same_prompt_share_blocks() -> None:
    model = prompted()
    text = list(range(5, 31))
    names: list[str | None] = ["a", "b", None, "a", "b", None]
    expected = alone(model, [text] * 6, names)
    with softhooks.rows(model, names):
        assert_same(served(model, [text] * 6, allow_block_sharing=True), expected)


@pytest.mark.parametrize("blocks", [32, 10])
def test_forks_and_requests_that_run_again_keep_their_prompt(blocks: int) -> None:
    """With 10 blocks of 4 tokens, requests are evicted and run again, and children do not fit beside their parents."""
    model = prompted()
    texts = [list(range(5 + 3 * row, 13 + 3 * row)) for row in range(4)]
    expected = alone(model, texts, NAMES, new=12)[0]
    generation = GenerationConfig(  # top_k=1 is greedy decoding, which transformers would not fork
        max_new_tokens=12, do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=-1, pad_token_id=zoo.PAD
    )
    sizes = config(num_blocks=blocks)
    with softhooks.rows(model, NAMES):
        told = model.generate_batch(texts, generation_config=generation, continuous_batching_config=sizes)
    assert {name.partition("__")[0] for name in told} == {f"req_{row}" for row in range(4)}
    for name, result in told.items():  # transformers 5.16 does not return the forks
        assert result.error is None
        assert result.generated_tokens == expected[int(name.partition("__")[0].removeprefix("req_"))]


def config(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{**SIZES, "max_batch_tokens": 16, **options})


# --- a manager that runs ------------------------------------------------------------------------------------------------


@contextmanager
def running(model: Any, **options: Any) -> Iterator[Any]:
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=config(**options))
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, timeout=60)
        manager.destroy()


def test_requests_choose_their_prompt_where_they_are_added() -> None:
    model, text = prompted(), [5, 6, 7]
    softhooks.activate(model, "a")
    expected = alone(model, [text] * 4, ["a", "b", None, "c"], new=4)[0]
    with running(model) as manager:
        assert ask(manager, text).generated_tokens == expected[0]
        for name, tokens in zip(NAMES, expected, strict=True):
            with softhooks.rows(model, [name]):
                assert ask(manager, text).generated_tokens == tokens
        with softhooks.rows(model, NAMES):
            ids = manager.add_requests([text] * 4, max_new_tokens=4)
        told = {result.request_id: result for result in (manager.get_result(timeout=120) for _ in ids)}
        assert [told[name].generated_tokens for name in ids] == expected
        assert ask(manager, text).generated_tokens == expected[0]


@pytest.mark.parametrize("where", ["prompted", "bare"])
def test_a_manager_made_without_a_prompt_serves_prompts_by_request(where: str) -> None:
    model, text = prompted(), [5, 6, 7]
    expected = alone(model, [text] * 2, [None, "b"], new=4)[0]
    with softhooks.disabled(model) if where == "bare" else softhooks.rows(model, [None]):
        manager = running(model)
        opened = manager.__enter__()
    try:
        with softhooks.rows(model, [None]):
            assert ask(opened, text).generated_tokens == expected[0]
        with softhooks.rows(model, ["b"]):
            assert ask(opened, text).generated_tokens == expected[1]
        if where == "bare":
            assert ask(opened, text).generated_tokens == expected[0]
    finally:
        manager.__exit__(None, None, None)


def test_another_prompt_of_the_same_name_is_not_mistaken_for_the_first() -> None:
    model, text = prompted(), list(range(5, 31))
    with running(model, allow_block_sharing=True) as manager:
        assert ask(manager, text).error is None
        for method in (PromptTuning(4), PromptTuning(4), PrefixTuning(4)):
            attention = model.config._attn_implementation  # transformers 5.16 also switches sdpa to paged attention
            model.set_attn_implementation(attention.removeprefix("paged|"))
            prompt = softhooks.attach(model, method, name="new")
            wake(prompt)
            expected = alone(model, [text], ["new"], new=4)[0]
            model.set_attn_implementation(attention)
            with softhooks.rows(model, ["new"]):
                told = ask(manager, text)
            assert told.error is None
            assert [told.generated_tokens] == expected
            prompt.remove()


def test_a_prompt_that_changes_while_a_manager_runs_is_refused() -> None:
    model = prompted()
    with running(model) as manager, softhooks.rows(model, ["b"]):
        assert ask(manager, [5, 6, 7]).error is None
        wake(softhooks.prompt.soft_prompts_of(softhooks.runtime.prompted_model.require_prompted_model(model))["b"])
        assert "'b' has changed since the paged cache was filled" in ask(manager, [5, 6, 7]).error


# --- refusals -----------------------------------------------------------------------------------------------------------

MIXED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "slots": (
        lambda model: softhooks.attach(model, PTuning(layout=Layout.insert(after={(5,): 1}, missing="skip")), "x"),
        r"'x' \(p_tuning, injection='slots'\) cannot be used in continuous batching",
    ),
    "branch": (lambda model: softhooks.attach(model, LlamaAdapter(3), "x"), "cannot mix gated branches with prompts"),
}


@pytest.mark.parametrize("kind", MIXED)
def test_prompts_that_cannot_share_a_batch_are_refused_by_name(kind: str) -> None:
    model, (attach, words) = prompted(), MIXED[kind]
    attach(model)
    with softhooks.rows(model, ["a"]):  # the active prompt, which no request uses, does not matter
        assert_same(served(model, [[5, 6, 7]]), alone(model, [[5, 6, 7]], ["a"]))
    softhooks.activate(model, "a")
    with softhooks.rows(model, ["a", "x", "a", "a"]), pytest.raises(UnsupportedModeError, match=words):
        served(model)
    expected = alone(model, [[5, 6, 7]], ["a"], new=4)[0]
    with running(model) as manager:
        with softhooks.rows(model, ["x"]), pytest.raises(UnsupportedModeError, match=words):
            manager.add_request([5, 6, 7])
        assert softhooks.runtime.request_prompts.is_waited_for(manager, "a") is False
        assert [ask(manager, [5, 6, 7]).generated_tokens] == expected


def test_a_prompt_with_added_tokens_mixes_with_no_other() -> None:
    model = prompted(methods={"a": PrefixTuning(3)})
    prompt = softhooks.attach(model, PromptTuning(3), "x", train_added_tokens=[90, 91])
    assert prompt.added is not None
    with (
        softhooks.rows(model, ["a", "x", None, "a"]),
        pytest.raises(UnsupportedModeError, match="'x', which trains added"),
    ):
        served(model)


def test_the_names_must_be_as_many_as_the_requests() -> None:
    model = prompted()
    with softhooks.rows(model, ["a", "b"]), pytest.raises(UnsupportedModeError, match="names 2 prompts for 4 requests"):
        served(model)
    with running(model) as manager:
        with softhooks.rows(model, ["a", "b"]):
            with pytest.raises(OptionError, match="names 2 prompts for one request"):
                manager.add_request([5, 6, 7])
            with pytest.raises(UnsupportedModeError, match="names 2 prompts for 3 requests"):
                manager.add_requests([[5, 6, 7]] * 3)
        with pytest.raises(NotAttachedError), softhooks.rows(model, ["other"]):
            pass
