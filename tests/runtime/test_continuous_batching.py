"""Continuous batching: many requests in one row, a paged cache, and a prompt before each request."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import table
import torch
import untouched
import zoo
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import softhooks
from softhooks import Layout, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning
from softhooks.errors import UnsupportedModeError

NEW = 6
SIZES: dict[str, Any] = {"num_blocks": 32}
SIZES["page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"] = 4
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [5, 6, 7, 8]]


@pytest.fixture(autouse=True)
def _no_prompt_before() -> None:
    untouched.remove_all()


def served(
    model: Any, texts: list[list[int]] = TEXTS, new: int = NEW, **options: Any
) -> tuple[list[list[int]], torch.Tensor]:
    """The tokens and log-probabilities of a continuous batch. With few tokens per step, prompts are processed in chunks."""
    config = {**SIZES, "max_batch_tokens": 8, "return_logprobs": True, **options}
    told = model.generate_batch(
        texts,
        generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=zoo.PAD),
        continuous_batching_config=ContinuousBatchingConfig(**config),
    )
    errors = [result.error for result in told.values() if result.error is not None]
    assert not errors, errors
    assert len(told) == len(texts)
    return [r.generated_tokens for r in told.values()], torch.tensor([r.logprobs for r in told.values()])


def generated(model: Any, texts: list[list[int]] = TEXTS, new: int = NEW) -> tuple[list[list[int]], torch.Tensor]:
    """The output of `generate` for each text alone."""
    tokens, logprobs = [], []
    for text in texts:
        ids = torch.tensor([text])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=zoo.PAD, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(text) :].tolist())
        logprobs.append([s[0].log_softmax(-1)[t].item() for s, t in zip(out.scores, tokens[-1], strict=True)])
    return tokens, torch.tensor(logprobs)


def assert_same(one: tuple[Any, torch.Tensor], other: tuple[Any, torch.Tensor]) -> None:
    assert one[0] == other[0]
    torch.testing.assert_close(one[1], other[1], atol=2e-5, rtol=2e-5)


def wake(prompt: Any) -> None:
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


FRONT = [
    "prompt", "p-tuning", "prefix", "prefix-mlp", "cpt", "p-tuning-v2", "residual", "context", "cartridge", "adapter",
    "adapter-v2", "mpt",
]  # fmt: skip
CASES = [("llama", "sdpa", name) for name in FRONT]
CASES += [
    (arch, "sdpa", name)
    for arch in ("gpt2", "gemma3", "mistral", "qwen3", "opt", "mixtral")
    for name in ("prompt", "prefix")
]
CASES += [(arch, "eager", name) for arch in ("llama", "gpt2", "gemma3", "mistral") for name in ("prompt", "prefix")]


@pytest.mark.parametrize(("arch", "attention", "name"), CASES)
def test_every_request_gets_what_generate_gives_it_alone(arch: str, attention: str, name: str) -> None:
    model = zoo.build(arch, attention=attention)
    bare = generated(model)
    prompt = table.BY_NAME[name].attach(model, 5)
    wake(prompt)
    expected = generated(model)
    assert (expected[1] - bare[1]).abs().max() > 1e-3
    assert_same(served(model), expected)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_prefix_that_leaves_the_text_where_it_is(arch: str) -> None:
    model = zoo.build(arch)
    wake(softhooks.attach(model, PrefixTuning(9, shift_positions=False)))
    assert_same(served(model), generated(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral"])
def test_a_prompt_that_is_longer_than_a_window_and_runs_first_in_a_continuous_batch(arch: str, attention: str) -> None:
    """Its own rows then meet an attention function that is for paged caches only."""
    model = zoo.build(arch, attention=attention)
    wake(softhooks.attach(model, PromptTuning(9)))
    other = copy.deepcopy(model)  # which keeps nothing of what the first one computes
    assert_same(served(model), generated(other))


def test_blocks_that_requests_share_and_several_answers_to_one() -> None:
    model = zoo.build("llama")
    wake(softhooks.attach(model, PromptTuning(5)))
    texts = [[*range(5, 30), last] for last in (30, 31, 32)]
    assert_same(served(model, texts, allow_block_sharing=True), generated(model, texts))


def test_a_prompt_is_computed_once_for_all_requests() -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(5))
    before = prompt.computed
    served(model)
    assert prompt.computed <= before + 1


def test_positions_are_each_sequence_s_own() -> None:
    """A table of 96 positions: together the requests have more, each alone has fewer, but for one."""
    model = zoo.build("gpt2")
    wake(softhooks.attach(model, PromptTuning(6)))
    texts = [list(range(5, 45)), list(range(6, 46)), list(range(7, 47))]
    assert_same(served(model, texts, max_batch_tokens=150), generated(model, texts))
    with pytest.raises(AssertionError, match=r"exceed the model|0 == 1"):  # earlier transformers drop it
        served(model, [list(range(4, 92))], max_batch_tokens=150)


def test_with_the_prompt_off_it_is_the_bare_model() -> None:
    model = zoo.build("llama")
    bare = served(model)
    assert_same(bare, generated(model))
    softhooks.attach(model, PromptTuning(5))
    with softhooks.disabled(model):
        assert_same(served(model), bare)
    assert served(model)[0] != bare[0]


def test_a_deep_copy_serves_its_own_prompt() -> None:
    model = zoo.build("llama")
    wake(softhooks.attach(model, PrefixTuning(4)))
    other = copy.deepcopy(model)
    wake(softhooks.runtime.prompted_model.require_prompted_model(other).prompts["default"])
    expected = generated(other)
    assert expected[0] != generated(model)[0]
    assert_same(served(other), expected)
    untouched.remove_all()


# --- a cache serves one prompt ------------------------------------------------------------------------------------------


def config() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**SIZES, max_batch_tokens=16)


def ask(manager: Any, text: list[int]) -> Any:
    name = manager.add_request(text, max_new_tokens=4)
    return manager.get_result(request_id=name, timeout=120)


def greedy() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=zoo.PAD)


@pytest.mark.parametrize("change", ["activate", "train"])
def test_a_prompt_that_changes_while_a_manager_runs_is_refused(change: str) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4), name="a")
    second = softhooks.attach(model, PromptTuning(4), name="b")
    wake(second)
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=config())
    manager.start()
    try:
        assert ask(manager, [5, 6, 7]).error is None
        if change == "activate":
            softhooks.activate(model, "a")
        else:
            wake(second)
        told = ask(manager, [5, 6, 7])
        assert "a cache can only be used with the same prompt" in told.error
    finally:
        manager.stop(block=True, timeout=60)
        manager.destroy()


@pytest.mark.parametrize("made", ["prompted", "bare"])
def test_a_manager_serves_what_was_on_where_it_was_made(made: str) -> None:
    """Its thread runs in the blocks of that place; those of other threads are theirs alone."""
    model, text = zoo.build("llama"), [5, 6, 7]
    wake(softhooks.attach(model, PromptTuning(4)))
    with softhooks.disabled(model) if made == "bare" else nullcontext():
        manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=config())
        expected = generated(model, [text], new=4)[0][0]
    manager.start()
    try:
        assert ask(manager, text).generated_tokens == expected
        with softhooks.disabled(model):
            assert ask(manager, text).generated_tokens == expected
        assert ask(manager, text).generated_tokens == expected
    finally:
        manager.stop(block=True, timeout=60)
        manager.destroy()


def test_a_manager_that_is_kept_takes_up_another_prompt_in_its_next_session() -> None:
    model = zoo.build("llama")
    prompts = [softhooks.attach(model, PromptTuning(4), name=name) for name in "ab"]
    for prompt in prompts:
        wake(prompt)
    try:
        for name in "aba":
            softhooks.activate(model, name)
            told = model.generate_batch(
                TEXTS, generation_config=greedy(), continuous_batching_config=config(), persistent_manager=True
            )
            assert [r.generated_tokens for r in told.values()] == generated(model, new=4)[0]
    finally:
        model.destroy_cached_continuous_batching_manager()


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (PromptTuning(3, placement="after_first"), "injection='slots'"),
    (PTuning(layout=Layout.insert(start=2, after={(5,): 1}, missing="skip")), "injection='slots'"),
    (MultitaskPromptTuning(3, tasks=["a", "b"]), "task_ids"),
]


@pytest.mark.parametrize(("method", "named"), REFUSED, ids=lambda value: getattr(value, "kind", value))
def test_prompts_that_one_row_cannot_meet_are_refused_before_a_manager_starts(method: Any, named: str) -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, method)
    with untouched.untouched(model), pytest.raises(UnsupportedModeError, match=named):
        served(model)
    with softhooks.disabled(model):
        assert_same(served(model), generated(model))
    prompt.remove()


OPTIONS = {"graphs": {"use_cuda_graph": True}, "compiled": {"varlen_compile_config": CompileConfig()}}


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_graphs_and_compiled_forwards_are_refused(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama", attention="eager")
    softhooks.attach(model, PromptTuning(3))
    asked = config()
    for name, value in option.items():
        setattr(asked, name, value)
    if "use_cuda_graph" in option:  # on a machine without an accelerator transformers turns it off itself
        monkeypatch.setattr(type(asked), "cuda_graph_booleans", property(lambda self: (True, True)))
    with (
        untouched.untouched(model),
        pytest.raises(UnsupportedModeError, match="does not support compilation or CUDA graphs"),
    ):
        model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=asked)


def test_removing_the_prompt_gives_continuous_batching_back_as_it_was() -> None:
    model = zoo.build("llama")
    before = served(model)
    with untouched.untouched(model):
        prompt = softhooks.attach(model, PrefixTuning(3))
        wake(prompt)
        served(model)
        prompt.remove()
    assert_same(served(model), before)
