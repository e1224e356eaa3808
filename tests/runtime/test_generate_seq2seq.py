"""Encoder-decoders generate the tokens of a naive decoding loop on the bare model, in every mode."""

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
from softhooks import PrefixTuning, PromptNotReachedError, PromptTuning

P, NEW = 4, 6
TEXTS = [zoo.text(1, length, seed=length, end=True)[0] for length in (7, 4, 2)]
METHODS = {
    "front": PromptTuning(P),
    "after-first": PromptTuning(P, placement="after_first"),
    "end": PromptTuning(P, placement="end"),
    "prefix": PrefixTuning(P),
}
EVERY = [(arch, way) for arch in zoo.SEQ2SEQ for way in METHODS]


@pytest.fixture(autouse=True, scope="module")
def _prompted_models_are_kept_for_this_file() -> Iterator[None]:
    yield
    prompted.cache_clear()
    remove_all()


@pytest.fixture(autouse=True)
def _no_prompt_left() -> None:
    """Skip the garbage collection after each test, because the models are kept."""


@cache
def prompted(arch: str, way: str) -> tuple[Any, tuple[naive.Step, ...], Tensor]:
    """A model with a prompt, the naive step of each text, and the token that decoding starts from."""
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    torch.manual_seed(3)
    prompt = softhooks.attach(model, METHODS[way])
    steps = tuple(naive.seq2seq_step(bare, prompt, text) for text in TEXTS)
    return model, steps, torch.tensor([model.config.decoder_start_token_id])


def generate(model: Any, **call: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **call})


def right_padded() -> dict[str, Tensor]:
    batch = {key: torch.zeros(len(TEXTS), 8, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    for i, text in enumerate(TEXTS):
        batch["input_ids"][i, : len(text)], batch["attention_mask"][i, : len(text)] = text, 1
    return batch


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_greedy(arch: str, way: str, mode: dict[str, Any]) -> None:
    model, steps, start = prompted(arch, way)
    expected = torch.stack([naive.greedy(step, start, NEW) for step in steps])
    assert torch.equal(generate(model, **right_padded(), **mode), expected)
    assert torch.equal(generate(model, **naive.left_padded(TEXTS, columns=8), **mode), expected)


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_beams(arch: str, way: str) -> None:
    model, steps, start = prompted(arch, way)
    expected = torch.stack([naive.beam(step, start, 3, NEW) for step in steps])
    assert torch.equal(generate(model, **right_padded(), num_beams=3), expected)


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_several_samples_of_each_text(arch: str, way: str) -> None:
    model, steps, start = prompted(arch, way)
    expected = naive.sample([step for step in steps for _ in range(2)], [start] * 6, NEW, seed=5)
    torch.manual_seed(5)
    drawn = generate(model, **right_padded(), do_sample=True, top_k=0, num_return_sequences=2)
    assert torch.equal(drawn, torch.stack(expected))


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_with_candidates(arch: str, way: str) -> None:
    """Prompt lookup, and an assistant that carries no prompt."""
    model, steps, start = prompted(arch, way)
    expected = naive.greedy(steps[0], start, NEW)[None]
    assert torch.equal(generate(model, input_ids=TEXTS[0][None], prompt_lookup_num_tokens=2), expected)
    assistant = naive.endless(zoo.build(arch, "seq2seq", seed=1))
    assert torch.equal(generate(model, input_ids=TEXTS[0][None], assistant_model=assistant), expected)


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_embeddings_instead_of_ids(arch: str, way: str) -> None:
    model, steps, start = prompted(arch, way)
    batch = right_padded()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    expected = torch.stack([naive.greedy(step, start, NEW) for step in steps])
    assert torch.equal(generate(model, inputs_embeds=embedded, **batch), expected)


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_encoder_outputs_of_the_prompted_encoder(arch: str, way: str) -> None:
    model, steps, start = prompted(arch, way)
    batch = right_padded()
    encoded = model.get_encoder()(**batch)
    found = generate(model, encoder_outputs=encoded, attention_mask=batch["attention_mask"])
    assert torch.equal(found, torch.stack([naive.greedy(step, start, NEW) for step in steps]))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_encoder_outputs_and_beams(arch: str, way: str, beams: int) -> None:
    """Those of the prompted encoder serve beams too; those of the bare one, or of another prompt, are refused."""
    model, steps, start = prompted(arch, way)
    batch = right_padded()
    mask = {"attention_mask": batch["attention_mask"], "num_beams": beams}
    expected = [naive.beam(step, start, beams, NEW) for step in steps]
    assert torch.equal(generate(model, encoder_outputs=model.get_encoder()(**batch), **mask), torch.stack(expected))
    message = r"outputs: *computed (without a prompt|with 'other')\nnow: *with 'default'(.|\n)*unchanged"
    with softhooks.disabled(model):
        encoded = model.get_encoder()(**batch)
    with pytest.raises(PromptNotReachedError, match=message):
        generate(model, encoder_outputs=encoded, **mask)
    with softhooks.attach(model, METHODS[way], "other"):
        encoded = model.get_encoder()(**batch)
    with pytest.raises(PromptNotReachedError, match=message):
        generate(model, encoder_outputs=encoded, **mask)


@pytest.mark.parametrize(("arch", "way"), EVERY)
def test_shapes_are_the_bare_models(arch: str, way: str) -> None:
    call = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    call |= {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 3, "do_sample": False}
    model = naive.endless(zoo.build(arch, "seq2seq", attention="eager"))
    for beams in (1, 2):
        bare = model.generate(**right_padded(), **call, num_beams=beams)
        with softhooks.attach(model, METHODS[way]):
            ours = model.generate(**right_padded(), **call, num_beams=beams)
        assert set(ours) == set(bare)
        for key in set(bare) - {"past_key_values"}:
            assert naive.shapes(ours[key]) == naive.shapes(bare[key]), key
