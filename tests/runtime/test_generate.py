"""Every mode of generation gives the tokens of a naive decoding loop on the bare model, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import naive
import pytest
import torch
import zoo
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning, UnsupportedModeError

P, NEW = 4, 6
ARCHS = (*zoo.CAUSAL, *zoo.CACHED)
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 1)]
ECHO = torch.tensor([9, 11, 13, 9, 11, 13, 9])
WAYS = {
    "prompt": (PromptTuning(P), None),
    "prefix": (PrefixTuning(P), None),
    "slots": (PromptTuning(P), "slots"),
    "after-first": (PromptTuning(P, placement="after_first"), None),
}
AS_KEYS = ("prompt", "prefix")
AS_SLOTS = ("slots", "after-first")


@pytest.fixture(autouse=True, scope="module")
def _prompted_models_are_kept_for_this_file() -> Iterator[None]:
    yield
    prompted.cache_clear()
    remove_all()


@pytest.fixture(autouse=True)
def _no_prompt_left() -> None:
    """Skip the garbage collection after each test, because the models are kept."""


@cache
def prompted(arch: str, way: str) -> tuple[Any, Any, naive.Step]:
    """A model with a prompt, the prompt, and the naive step of another instance with the same weights."""
    model, bare = naive.endless(zoo.build(arch)), naive.endless(zoo.build(arch))
    method, injection = WAYS[way]
    torch.manual_seed(3)
    prompt = softhooks.attach(model, method, injection=injection)
    return model, prompt, naive.step_of(bare, prompt)


def generate(model: Any, **call: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **call})


def same_rows(generated: Tensor, expected: list[Tensor]) -> bool:
    """Each row without its padding equals the expected one."""
    assert len(generated) == len(expected)
    return all(torch.equal(row[-len(right) :], right) for row, right in zip(generated, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_with_left_padding(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    expected = [naive.greedy(step, row, NEW) for row in ROWS]
    assert same_rows(generate(model, **naive.left_padded(ROWS)), expected)
    assert same_rows(generate(model, **naive.left_padded(ROWS, columns=11)), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_without_a_cache(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    expected = [naive.greedy(step, row, NEW) for row in ROWS]
    assert same_rows(generate(model, **naive.left_padded(ROWS), use_cache=False), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_beams(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    expected = [naive.beam(step, row, 3, NEW) for row in ROWS]
    assert same_rows(generate(model, **naive.left_padded(ROWS), num_beams=3), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_several_samples_of_each_row(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    rows = [row for row in ROWS for _ in range(2)]
    expected = naive.sample([step] * 6, rows, NEW, seed=5)
    torch.manual_seed(5)
    drawn = generate(model, **naive.left_padded(ROWS), do_sample=True, top_k=0, num_return_sequences=2)
    assert same_rows(drawn, expected)


@pytest.mark.parametrize("way", AS_KEYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_static_cache(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    expected = [naive.greedy(step, row, NEW) for row in ROWS]
    assert same_rows(generate(model, **naive.left_padded(ROWS), cache_implementation="static"), expected)
    for row, right in zip(ROWS, expected, strict=True):  # no mask reaches the model here; one row is a single token
        assert same_rows(generate(model, input_ids=row[None], cache_implementation="static"), [right])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_prefill_in_chunks(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    rows = [ROWS[0], ROWS[0][2:]]
    expected = [naive.greedy(step, row, NEW) for row in rows]
    assert same_rows(generate(model, **naive.left_padded(rows), prefill_chunk_size=3), expected)
    assert same_rows(generate(model, input_ids=rows[0][None], prefill_chunk_size=1), expected[:1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_prefill_in_chunks_of_padding(arch: str, way: str) -> None:
    """Some rows are nothing but padding in the first chunk: slots would not stand next to their text."""
    model, _, step = prompted(arch, way)
    batch = naive.left_padded(ROWS)
    if way in AS_SLOTS:
        with pytest.raises(
            UnsupportedModeError,
            match=r"first chunk of the prefill(.|\n)*only padding in row 2(.|\n)*prefill_chunk_size",
        ):
            generate(model, **batch, prefill_chunk_size=3)
    else:
        expected = [naive.greedy(step, row, NEW) for row in ROWS]
        assert same_rows(generate(model, **batch, prefill_chunk_size=3), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_prompt_lookup(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    found = generate(model, input_ids=ECHO[None], prompt_lookup_num_tokens=3)
    assert same_rows(found, [naive.greedy(step, ECHO, NEW)])


@cache
def can_be_assisted_bare(arch: str) -> bool:
    model, assistant = naive.endless(zoo.build(arch)), naive.endless(zoo.build(arch, seed=1))
    try:
        generate(model, input_ids=ROWS[0][None], assistant_model=assistant)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("arch", ARCHS)
def test_an_assistant(arch: str, seed: int, way: str) -> None:
    """An assistant that is mostly wrong, and one with the model's weights; neither has the prompt."""
    model, _, step = prompted(arch, way)
    assistant = naive.endless(zoo.build(arch, seed=seed))
    if not can_be_assisted_bare(arch):
        pytest.skip("this version of transformers fails to assist the bare model: sliding caches, before 5.18")
    found = generate(model, input_ids=ROWS[0][None], assistant_model=assistant)
    assert same_rows(found, [naive.greedy(step, ROWS[0], NEW)])


def test_an_assistant_with_a_prompt_of_its_own() -> None:
    model, _, step = prompted("llama", "prompt")
    assistant = naive.endless(zoo.build("llama", seed=1))
    with softhooks.attach(assistant, PrefixTuning(3)):
        found = generate(model, input_ids=ROWS[0][None], assistant_model=assistant)
    assert same_rows(found, [naive.greedy(step, ROWS[0], NEW)])


@pytest.mark.parametrize("way", AS_KEYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_continuing_from_a_returned_cache(arch: str, way: str) -> None:
    model, _, step = prompted(arch, way)
    batch, more = naive.left_padded(ROWS), torch.tensor([5, 6])
    first = generate(model, **batch, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + NEW - 1
    ids = torch.cat([first.sequences, more.expand(3, 2)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW + 2, dtype=torch.long)], 1)
    second = generate(model, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)
    read = [torch.cat([naive.greedy(step, row, NEW), more]) for row in ROWS]
    assert same_rows(second, [naive.greedy(step, row, NEW) for row in read])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_embeddings_instead_of_ids(arch: str, way: str) -> None:
    model, prompt, step = prompted(arch, way)
    batch = naive.left_padded(ROWS)
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    found = generate(model, inputs_embeds=embedded, **batch)
    assert same_rows(found, [naive.greedy(step, row, NEW)[-NEW:] for row in ROWS])
    # ... also where no ids would give these embeddings
    bare = zoo.build(arch)
    odd = embedded[:1] * 1.5
    assert same_rows(
        generate(model, inputs_embeds=odd), [naive.greedy(naive.step_of(bare, prompt, odd[0]), ROWS[0][:0], NEW)]
    )


@pytest.mark.parametrize("way", AS_SLOTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_slots_refuse_a_static_cache(arch: str, way: str) -> None:
    model, _, _ = prompted(arch, way)
    for batch in (naive.left_padded(ROWS), *({"input_ids": row[None]} for row in ROWS)):
        with pytest.raises(UnsupportedModeError, match="cache that grows"):
            generate(model, **batch, cache_implementation="static")


@pytest.mark.parametrize("way", AS_SLOTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_slots_refuse_a_returned_cache(arch: str, way: str) -> None:
    model, _, _ = prompted(arch, way)
    first = generate(model, **naive.left_padded(ROWS[:2]), return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6]] * 2)], 1)
    with pytest.raises(UnsupportedModeError, match="only be used in the generation that filled it"):
        generate(model, input_ids=ids, attention_mask=(ids != 0).long(), past_key_values=first.past_key_values)


@pytest.mark.parametrize("way", AS_SLOTS)
def test_slots_refuse_a_cache_that_was_filled_without_them(way: str) -> None:
    model, _, _ = prompted("llama", way)
    with softhooks.disabled(model):
        first = generate(model, input_ids=ROWS[0][None], return_dict_in_generate=True)
    with pytest.raises(UnsupportedModeError):
        model(first.sequences[:, -1:], past_key_values=first.past_key_values)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gptj", "bloom"])
def test_a_decoding_loop_of_ones_own(arch: str, tuples: bool, way: str) -> None:
    """The cache is made by the model, and the mask is left out."""
    model, _, step = prompted(arch, way)
    row, cache = ROWS[0], None
    new = row[None]
    for _ in range(NEW):
        output = model(new, past_key_values=cache, use_cache=True, return_dict=not tuples)
        cache = output[1]
        new = output[0][:, -1].argmax(-1)[:, None]
        row = torch.cat([row, new[0]])
    assert torch.equal(row, naive.greedy(step, ROWS[0], NEW))
