"""Other outputs of generation: shapes, streams, pipelines; and the prompt is computed once."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import tokens
import torch
import transformers
import zoo

import softhooks
from softhooks import PrefixTuning, PromptTuning

P, NEW = 4, 5
ARCHS = (*zoo.CAUSAL, *zoo.CACHED)
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4)]
WAYS = {
    "prompt": (PromptTuning(P), None),
    "prefix": (PrefixTuning(P), None),
    "slots": (PromptTuning(P), "slots"),
    "after-first": (PromptTuning(P, placement="after_first"), None),
}


def attach(model: Any, way: str) -> Any:
    method, injection = WAYS[way]
    return softhooks.attach(model, method, injection=injection)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ARCHS)
def test_shapes_are_the_bare_models(arch: str, way: str) -> None:
    call = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    call |= {"output_hidden_states": True, "max_new_tokens": 3, "do_sample": False}
    model = naive.endless(zoo.build(arch, attention="eager"))
    call["output_attentions"] = True
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        bare = model.generate(**naive.left_padded(ROWS), **call, **more)
        with attach(model, way):
            ours = model.generate(**naive.left_padded(ROWS), **call, **more)
        assert set(ours) == set(bare)
        for key in set(bare) - {"past_key_values"}:
            assert naive.shapes(ours[key]) == naive.shapes(bare[key]), (more, key)


def test_scores_and_hidden_states_are_the_naive_ones() -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    with attach(model, "prompt") as prompt:
        found = model.generate(
            **naive.left_padded(ROWS),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    step = naive.step_of(bare, prompt)
    for token in range(NEW):
        expected = torch.stack([step(naive.greedy(step, row, token)) for row in ROWS])
        torch.testing.assert_close(found.logits[token], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_text_generation_pipeline(way: str) -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    prompt = attach(model, way)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokens.tokenizer(), device="cpu")
    texts = [tokens.words(row) for row in ROWS]
    found = pipeline(texts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_tensors=True)
    step = naive.step_of(bare, prompt)
    for (answer,), row in zip(found, ROWS, strict=True):
        framed = torch.cat([torch.tensor([zoo.BOS]), row, torch.tensor([zoo.EOS])])
        expected = naive.greedy(step, framed, NEW).tolist()
        assert answer["generated_token_ids"][-len(expected) :] == expected


def test_a_streamer_sees_every_token_once() -> None:
    class Collect(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Any) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None: ...

    model, bare, streamer = naive.endless(zoo.build("llama")), zoo.build("llama"), Collect()
    with attach(model, "prompt") as prompt:
        model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.seen == naive.greedy(naive.step_of(bare, prompt), ROWS[0], NEW).tolist()


# --- the prompt's keys and values are computed once -------------------------------------------------------------------


@pytest.mark.parametrize("way", ["prompt", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "gptj", "gemma3"])
def test_keys_and_values_are_computed_once_in_each_call(arch: str, way: str) -> None:
    model = naive.endless(zoo.build(arch))
    with attach(model, way) as prompt:
        before = prompt.computed
        ways = ({}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False})
        for calls, more in enumerate(ways, start=1):
            model.generate(**naive.left_padded(ROWS), max_new_tokens=NEW, **{"do_sample": False, **more})
            assert prompt.computed == before + calls
        with softhooks.kept(model):
            for more in ways:
                model.generate(**naive.left_padded(ROWS), max_new_tokens=NEW, **{"do_sample": False, **more})
        assert prompt.computed == before + len(ways) + 1


def _in_place(model: Any, prompt: Any) -> None:
    with torch.no_grad():
        next(prompt.encoder.parameters()).add_(0.5)


def _through_data(model: Any, prompt: Any) -> None:
    next(prompt.encoder.parameters()).data.mul_(1.5)


def _new_data(model: Any, prompt: Any) -> None:
    parameter = next(prompt.encoder.parameters())
    parameter.data = parameter.data * 1.5


def _a_step(model: Any, prompt: Any) -> None:
    with torch.enable_grad():
        model(ROWS[0][None], labels=ROWS[0][None]).loss.backward()
    torch.optim.SGD(prompt.parameters(), lr=1.0).step()


def _a_loaded_state(model: Any, prompt: Any) -> None:
    prompt.encoder.load_state_dict({name: value * 1.5 for name, value in prompt.encoder.state_dict().items()})


PROMPT_CHANGES = [_in_place, _through_data, _new_data, _a_step, _a_loaded_state]


@pytest.mark.parametrize("change", PROMPT_CHANGES)
@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_computed_again_when_the_prompt_has_changed(way: str, change: Any) -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    with attach(model, way) as prompt:
        model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=False)
        change(model, prompt)
        found = model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found[0], naive.greedy(naive.step_of(bare, prompt), ROWS[0], NEW))


def test_computed_again_when_the_base_has_changed() -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    with attach(model, "prompt") as prompt:
        for change in (0.8, 1.3):
            model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                for one in (model, bare):
                    one.model.layers[0].self_attn.v_proj.weight.mul_(change)
            found = model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=False)
            assert torch.equal(found[0], naive.greedy(naive.step_of(bare, prompt), ROWS[0], NEW))


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_computed_again_in_another_precision(way: str) -> None:
    """fp32, autocast, bf16 and back: each gives the logits of a prompt attached in that precision."""
    ids = ROWS[0][None]
    model = naive.endless(zoo.build("llama"))

    @torch.no_grad()
    def logits(one: Any, autocast: torch.dtype | None) -> torch.Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return one(ids).logits

    def fresh(dtype: torch.dtype, autocast: torch.dtype | None, saved: dict[str, Any]) -> torch.Tensor:
        other = zoo.build("llama").to(dtype)
        with attach(other, way) as prompt:
            prompt.encoder.load_state_dict(saved)
            return logits(other, autocast)

    with attach(model, way) as prompt:
        saved = {name: value.clone() for name, value in prompt.encoder.state_dict().items()}
        logits(model, None)
        for autocast in (torch.bfloat16, torch.float16, None):
            assert torch.equal(logits(model, autocast), fresh(torch.float32, autocast, saved))
        model.to(torch.bfloat16)
        assert torch.equal(logits(model, None), fresh(torch.bfloat16, None, saved))
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, fresh(torch.bfloat16, None, saved))
