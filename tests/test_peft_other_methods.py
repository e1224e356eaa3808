"""Decoding and masks that PEFT gets wrong or fails in, with every other method, equal the bare model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import adapters
import contexts
import naive
import oracles
import pytest
import tiny_models as models
import torch
import zoo
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import LlamaAdapter, MultitaskPromptTuning, PTuning, PTuningV2, UnsupportedMethodError

P, T, NEW = 4, 7, 6
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (T, 4, 3)]
TASKS = (1, 0, 1)
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
METHODS: dict[str, Callable[[], Any]] = {
    "p-tuning": lambda: PTuning(P),
    "p-tuning-v2": lambda: PTuningV2(P),
    "mpt": lambda: MultitaskPromptTuning(P, tasks=2),
    "cpt": contexts.method,
    "adapter": lambda: LlamaAdapter(P),
}
PAIRS = [
    ("gpt2", "p-tuning"), ("opt", "p-tuning"), ("qwen3", "p-tuning-v2"), ("gptj", "p-tuning-v2"), ("llama", "mpt"),
    ("falcon", "mpt"), ("gpt2", "cpt"), ("mistral", "cpt"), ("qwen3", "adapter"), ("mixtral", "adapter"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def prompted(arch: str, way: str) -> tuple[Any, Any, Any]:
    """A model with a prompt that has an effect, the prompt, and a bare model with the same weights."""
    model, bare = naive.endless(zoo.build(arch)), naive.endless(zoo.build(arch))
    prompt = softhooks.attach(model, METHODS[way]())
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    prompt.encoder.eval()
    return model, prompt, bare


def told(way: str, *tasks: int) -> dict[str, Tensor]:
    """The batch columns of a call."""
    return {"task_ids": torch.tensor(tasks)} if way == "mpt" else {}


@torch.no_grad()
def step_of(bare: Any, prompt: Any, task: int = 0) -> naive.Step:
    """The naive step of a prompt on the bare model."""
    if prompt.method.enters == "embeddings":
        return naive.prompt_step(bare, prompt.encoder("embeddings", task).detach())
    if prompt.method.enters == "attention":
        heads = getattr(bare.config, "num_key_value_heads", None) or bare.config.num_attention_heads
        return naive.prefix_step(bare, *oracles.cut_table(prompt.encoder("text"), 2, heads))

    def step(row: Tensor) -> Tensor:
        with adapters.patched(adapters.branches(bare, dict(prompt.encoder.named_parameters()), prompt.method)):
            return bare(row[None], use_cache=False).logits[0, -1]

    return step


def expected_of(bare: Any, prompt: Any) -> list[Tensor]:
    """The expected tokens of each row, with its task's prompt."""
    steps = [step_of(bare, prompt, task if isinstance(prompt.method, MultitaskPromptTuning) else 0) for task in TASKS]
    return [naive.greedy(step, row, NEW) for step, row in zip(steps, ROWS, strict=True)]


@pytest.mark.parametrize(("arch", "way"), PAIRS)
def test_case_14_every_way_of_decoding(arch: str, way: str) -> None:
    """Assisted by a model without prompts, and by prompt lookup; and with a static cache."""
    model, prompt, bare = prompted(arch, way)
    expected = expected_of(bare, prompt)
    one = {"input_ids": ROWS[0][None], **told(way, TASKS[0])}
    every = {**naive.left_padded(ROWS), **told(way, *TASKS)}
    for call in (
        {**one, "assistant_model": naive.endless(zoo.build(arch, seed=1))},
        {**one, "prompt_lookup_num_tokens": 2},
        {**every, "cache_implementation": "static"},
    ):
        found = model.generate(**call, **GREEDY)
        for ours, right in zip(found, expected, strict=False):
            assert torch.equal(ours[-len(right) :], right), call.keys()
    with softhooks.disabled(model):
        assert not torch.equal(found, model.generate(**call, **GREEDY))


@pytest.mark.parametrize(("arch", "way"), PAIRS[1::2])
def test_case_14_continuing_from_a_returned_cache(arch: str, way: str) -> None:
    model, prompt, bare = prompted(arch, way)
    given, more = told(way, 1), torch.tensor([5, 6])
    first = model.generate(ROWS[0][None], **given, **GREEDY, return_dict_in_generate=True)
    row = torch.cat([first.sequences[0], more])
    found = model.generate(row[None], **given, **GREEDY, past_key_values=first.past_key_values)[0]
    step = step_of(bare, prompt, 1 if given else 0)
    assert torch.equal(found, naive.greedy(step, torch.cat([naive.greedy(step, ROWS[0], NEW), more]), NEW))


def test_an_assistant_of_the_same_prompts_is_told_the_tasks_too() -> None:
    """Batch columns are not passed to an assistant without prompts; one with prompts needs them."""
    model, prompt, bare = prompted("llama", "mpt")
    assistant = naive.endless(zoo.build("llama", seed=1))
    softhooks.attach(assistant, METHODS["mpt"]())
    call = {"input_ids": ROWS[0][None], **told("mpt", 1), **GREEDY}
    assert torch.equal(model.generate(**call, assistant_model=assistant)[0], expected_of(bare, prompt)[0])
    softhooks.attach(naive.endless(bare), METHODS["mpt"]())
    with untouched(bare), pytest.raises(softhooks.UnsupportedModeError, match="task_ids"):
        bare.generate(ROWS[0][None], **GREEDY, assistant_model=assistant)


@torch.no_grad()
def seen_logits(bare: Any, prompt: Any, row: Tensor, seen: Tensor, task: int) -> Tensor:
    """The logits of one row on the bare model, whose tokens see what `seen` [T, T] says, and all of the prompt."""
    if prompt.method.enters == "branch":
        with adapters.patched(adapters.branches(bare, dict(prompt.encoder.named_parameters()), prompt.method)):
            return bare(row[None], attention_mask=seen[None, None], use_cache=False).logits[0]
    if prompt.method.enters == "attention":
        heads = getattr(bare.config, "num_key_value_heads", None) or bare.config.num_attention_heads
        cache = oracles.seeded_cache(bare, *oracles.cut_table(prompt.encoder("text"), 2, heads))
        wide = torch.cat([torch.ones(T, P, dtype=torch.bool), seen], 1)[None, None]
        positions = torch.arange(P, P + T)[None]
        return bare(row[None], attention_mask=wide, position_ids=positions, past_key_values=cache).logits[0]
    rows = prompt.encoder("embeddings", task)
    count = rows.shape[0]
    wide = torch.ones(count + T, count + T, dtype=torch.bool).tril()
    wide[count:, count:] = seen
    embedded = torch.cat([rows, bare.get_input_embeddings()(row)])[None]
    positions = torch.arange(count + T)[None]
    return bare(inputs_embeds=embedded, attention_mask=wide[None, None], position_ids=positions).logits[0, count:]


@pytest.mark.parametrize(("arch", "way"), [pair for pair in PAIRS if pair[0] not in ("gptj", "falcon", "mistral")])
def test_masks_of_four_dimensions(arch: str, way: str) -> None:
    """A text whose first three tokens see each other both ways; every token sees the prompt, in MPT that of its row's task."""
    model, prompt, bare = prompted(arch, way)
    ids, tasks = zoo.text(2, T), (1, 0)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    seen[:3, :3] = True
    given = told(way, *tasks)
    with torch.no_grad():
        found = model(ids, attention_mask=seen.expand(2, 1, -1, -1), **given).logits
        plain = model(ids, **given).logits
    for ours, row, task in zip(found, ids, tasks, strict=True):
        torch.testing.assert_close(ours, seen_logits(bare, prompt, row, seen, task if given else 0), **CLOSE)
    assert float((found - plain).abs().max()) > 1e-2


def test_an_adapter_is_refused_where_no_branch_can_enter() -> None:
    model = models.build("mamba2", "causal")
    with (
        untouched(model),
        pytest.raises(UnsupportedMethodError, match="does not use transformers' attention interface"),
    ):
        softhooks.attach(model, LlamaAdapter(P))
