"""One prompt per row: each row of a batch, in forward and generate, equals the row run alone."""

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
from softhooks import NotAttachedError, OptionError, PrefixTuning, PromptTuning, UnsupportedModeError

NEW = 6
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
DECODERS = (*zoo.CAUSAL, *zoo.CACHED)
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3, 5)]
MIXES = {
    "prompts": ({"a": PromptTuning(5), "b": PromptTuning(2)}, None, ["a", "b", None, "b"]),
    "prefixes": ({"a": PrefixTuning(5), "b": PrefixTuning(2)}, None, ["b", "a", "a", None]),
    "a prompt and a prefix": ({"a": PromptTuning(3), "b": PrefixTuning(7)}, None, ["b", "a", None, "b"]),
    "slots": ({"a": PromptTuning(5), "b": PromptTuning(2)}, "slots", ["a", "b", None, "b"]),
    "slots after the first": (
        {"a": PromptTuning(2, placement="after_first"), "b": PromptTuning(5, placement="after_first")},
        None,
        ["a", "b", None, "b"],
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _prompted_models_are_kept_for_this_file() -> Iterator[None]:
    yield
    decoder.cache_clear()
    remove_all()


@pytest.fixture(autouse=True)
def _no_prompt_left() -> None:
    """Skip the garbage collection after each test, because the models are kept."""


@cache
def decoder(arch: str, mix: str) -> tuple[Any, list[str | None], tuple[naive.Step, ...]]:
    """A model with two prompts, a name for each row, and each row's naive step."""
    methods, injection, names = MIXES[mix]
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    torch.manual_seed(3)
    prompts = {name: softhooks.attach(model, m, name, injection=injection) for name, m in methods.items()}
    return model, names, tuple(naive.step_of(bare, prompts[name] if name else None) for name in names)


def right_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    flipped = naive.left_padded([row.flip(0) for row in rows])
    return {key: value.flip(1) for key, value in flipped.items()}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", DECODERS)
def test_each_row_of_a_forward(arch: str, mix: str) -> None:
    model, names, steps = decoder(arch, mix)
    expected = torch.stack([step(row) for step, row in zip(steps, ROWS, strict=True)])
    with softhooks.rows(model, names), torch.no_grad():
        left = model(**naive.left_padded(ROWS)).logits[:, -1]
        right = model(**right_padded(ROWS)).logits
    torch.testing.assert_close(left, expected, **CLOSE)
    last = torch.stack([logits[len(row) - 1] for logits, row in zip(right, ROWS, strict=True)])
    torch.testing.assert_close(last, expected, **CLOSE)


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", DECODERS)
def test_each_row_of_generate(arch: str, mix: str, more: dict[str, Any]) -> None:
    model, names, steps = decoder(arch, mix)
    with softhooks.rows(model, names):
        found = model.generate(**naive.left_padded(ROWS), max_new_tokens=NEW, do_sample=False, **more)
    for ours, step, row in zip(found, steps, ROWS, strict=True):
        assert torch.equal(ours[-len(row) - NEW :], naive.greedy(step, row, NEW))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gptj"])
def test_beams_and_samples_belong_to_their_row(arch: str, mix: str) -> None:
    model, names, steps = decoder(arch, mix)
    batch = naive.left_padded(ROWS)
    with softhooks.rows(model, names):
        beams = model.generate(**batch, max_new_tokens=NEW, do_sample=False, num_beams=3)
        torch.manual_seed(5)
        drawn = model.generate(**batch, max_new_tokens=NEW, do_sample=True, top_k=0, num_return_sequences=2)
    for ours, step, row in zip(beams, steps, ROWS, strict=True):
        assert torch.equal(ours[-len(row) - NEW :], naive.beam(step, row, 3, NEW))
    twice = [(step, row) for step, row in zip(steps, ROWS, strict=True) for _ in range(2)]
    expected = naive.sample([step for step, _ in twice], [row for _, row in twice], NEW, seed=5)
    for ours, right in zip(drawn, expected, strict=True):
        assert torch.equal(ours[-len(right) :], right)


@pytest.mark.parametrize("mix", [mix for mix in MIXES if "slots" not in mix])
def test_static_caches(mix: str) -> None:
    for arch in ("llama", "gemma3", "bloom"):
        model, names, steps = decoder(arch, mix)
        with softhooks.rows(model, names):
            found = model.generate(
                **naive.left_padded(ROWS), max_new_tokens=NEW, do_sample=False, cache_implementation="static"
            )
        for ours, step, row in zip(found, steps, ROWS, strict=True):
            assert torch.equal(ours[-len(row) - NEW :], naive.greedy(step, row, NEW))


@pytest.mark.parametrize("injection", [None, "slots"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gptj"])
def test_prompts_of_one_length(arch: str, injection: Any) -> None:
    """Rows have no padding, so that no mask is needed."""
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    prompts = {name: softhooks.attach(model, PromptTuning(3), name, injection=injection) for name in ("a", "b")}
    with softhooks.rows(model, ["b", "a", "a", "b"]):
        found = model.generate(**naive.left_padded(ROWS), max_new_tokens=NEW, do_sample=False)
    for ours, name, row in zip(found, ("b", "a", "a", "b"), ROWS, strict=True):
        assert torch.equal(ours[-len(row) - NEW :], naive.greedy(naive.step_of(bare, prompts[name]), row, NEW))


@pytest.mark.parametrize("mix", MIXES)
def test_each_prompt_gets_its_own_rows_gradient(mix: str) -> None:
    methods, injection, names = MIXES[mix]
    model = zoo.build("llama")
    prompts = {name: softhooks.attach(model, m, name, injection=injection) for name, m in methods.items()}

    def gradients(logits: Tensor) -> list[Tensor]:
        parameters = [parameter for prompt in prompts.values() for parameter in prompt.encoder.parameters()]
        return list(torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True))

    with softhooks.rows(model, names):
        together = gradients(torch.cat([out[-len(row) :] for out, row in zip(
            model(**naive.left_padded(ROWS)).logits, ROWS, strict=True)]))  # fmt: skip
    alone = []
    for name, row in zip(names, ROWS, strict=True):
        if name is not None:
            softhooks.activate(model, name)
            alone.append(model(row[None]).logits[0])
    for ours, theirs in zip(together, gradients(torch.cat(alone)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


ENCODER_MIXES = {
    "front": {"a": PromptTuning(5), "b": PromptTuning(2)},
    "after-first": {"a": PromptTuning(5, placement="after_first"), "b": PromptTuning(2, placement="after_first")},
    "end": {"a": PromptTuning(5, placement="end"), "b": PromptTuning(2, placement="end")},
    "prefix": {"a": PrefixTuning(5), "b": PrefixTuning(2)},
}


@pytest.mark.parametrize("head", ["tokens", "sequence", "qa", "masked"])
@pytest.mark.parametrize("mix", ENCODER_MIXES)
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_rows_of_an_encoder_with_their_own_heads(arch: str, mix: str, head: str) -> None:
    model, names = zoo.build(arch, head), ["a", None, "b", "a"]
    prompts = {name: softhooks.attach(model, method, name) for name, method in ENCODER_MIXES[mix].items()}
    with torch.no_grad():
        for prompt in prompts.values():
            for parameter in prompt.heads.parameters():
                parameter.add_(torch.randn_like(parameter))
        with softhooks.rows(model, names):
            together = zoo.main_output(model(**right_padded(ROWS)))
        for i, (name, row) in enumerate(zip(names, ROWS, strict=True)):
            with softhooks.disabled(model) if name is None else softhooks.rows(model, [name]):
                alone = zoo.main_output(model(row[None]))[0]
            own = together[i] if head == "sequence" else together[i, : len(row)]
            torch.testing.assert_close(own, alone, **CLOSE)
    assert len(next(iter(prompts.values())).heads) == (head != "masked")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mix", ENCODER_MIXES)
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_rows_of_an_encoder_decoder(arch: str, mix: str, beams: int) -> None:
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    prompts = {name: softhooks.attach(model, method, name) for name, method in ENCODER_MIXES[mix].items()}
    names, start = ["a", "b", None, "b"], torch.tensor([model.config.decoder_start_token_id])
    with softhooks.rows(model, names):
        found = model.generate(**right_padded(ROWS), max_new_tokens=NEW, do_sample=False, num_beams=beams)
    for ours, name, row in zip(found, names, ROWS, strict=True):
        step = naive.seq2seq_step(bare, prompts[name] if name else None, row)
        assert torch.equal(ours, naive.greedy(step, start, NEW) if beams == 1 else naive.beam(step, start, 3, NEW))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_no_row_with_a_prompt_is_the_bare_model(arch: str, mix: str) -> None:
    model, _, _ = decoder(arch, mix)
    ids = zoo.text(2, 6)
    with softhooks.rows(model, [None, None]):
        ours = model(ids).logits
        again = model.generate(ids, max_new_tokens=3, do_sample=False)
    with softhooks.disabled(model):
        assert torch.equal(ours, model(ids).logits)
        assert torch.equal(again, model.generate(ids, max_new_tokens=3, do_sample=False))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a"], ["a", "b", "a"], ["a"] * 8])
def test_a_wrong_number_of_rows(names: list[str]) -> None:
    """Also a number that divides the batch's: only in generate may a row stand for several."""
    model, _, _ = decoder("llama", "prompts")
    ids = zoo.text(4, 6)
    with softhooks.rows(model, names):
        with pytest.raises(
            UnsupportedModeError,
            match=rf"^`rows` names {len(names)} prompts for a batch of 4 rows; name one prompt for each row",
        ):
            model(ids)
        if 4 % len(names):
            with pytest.raises(UnsupportedModeError, match="one prompt for each row"):
                model.generate(ids, max_new_tokens=2)
    assert model(ids).logits.shape == (4, 6, zoo.VOCABULARY)


def test_too_few_rows_in_generate() -> None:
    model, _, _ = decoder("llama", "prompts")
    with softhooks.rows(model, ["a", "b"]), pytest.raises(UnsupportedModeError, match="one prompt for each row"):
        model.generate(zoo.text(4, 6), max_new_tokens=2, do_sample=False)


def test_generate_is_the_models_own_again_after_rows() -> None:
    model, _, _ = decoder("llama", "prompts")
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError), softhooks.rows(model, ["a", "b"]):
        raise RuntimeError
    assert model.__dict__ == before


@pytest.mark.parametrize("names", ["a", [], ()])
def test_rows_that_are_no_list_of_names(names: Any) -> None:
    model, _, _ = decoder("llama", "prompts")
    with (
        pytest.raises(OptionError, match="a list with one entry for each row: the name of a prompt"),
        softhooks.rows(model, names),
    ):
        pass


def test_unknown_names() -> None:
    model, _, _ = decoder("llama", "prompts")
    message = r"^no prompt named 'c' is attached(.|\n)*attached: *'a', 'b'"
    with pytest.raises(NotAttachedError, match=message), softhooks.rows(model, ["a", "c"]):
        pass
    with pytest.raises(NotAttachedError, match=message):
        softhooks.activate(model, "c")
    for use in (softhooks.disabled, lambda m: softhooks.rows(m, ["a"]), lambda m: softhooks.activate(m, "a")):
        with pytest.raises(NotAttachedError, match="has no prompt"), use(zoo.build("llama")):
            pass


def test_mixed_kinds() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    softhooks.attach(model, PromptTuning(3), "front")
    softhooks.attach(model, PromptTuning(3, placement="after_first"), "inside")
    with softhooks.rows(model, ["front", "inside"]):
        with pytest.raises(UnsupportedModeError, match=r"must all enter as slots(.|\n)*front: shared, inside: slots"):
            model(ids)
        with pytest.raises(UnsupportedModeError):
            model.generate(ids, max_new_tokens=2)
    softhooks.attach(model, PromptTuning(3), "other", injection="slots")
    with softhooks.rows(model, ["other", "inside"]), torch.no_grad():
        together = model(ids).logits
        for row, name in enumerate(("other", "inside")):
            softhooks.activate(model, name)
            with softhooks.rows(model, [name]):
                torch.testing.assert_close(together[row], model(ids[row : row + 1]).logits[0], **CLOSE)
    softhooks.activate(model, "front")
    assert bool(model(ids).logits.isfinite().all())
