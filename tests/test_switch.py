"""Switching prompts: activate, disabled, remove, names, and nested contexts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import AttachError, NameTakenError, NotAttachedError, PrefixTuning, PromptTuning, SoftPrompt

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


def three() -> tuple[Any, dict[str, SoftPrompt], dict[str | None, Tensor]]:
    """A model with three prompts, and its logits with each and with none."""
    model = zoo.build("llama")
    logits: dict[str | None, Tensor] = {None: model(IDS).logits}
    prompts = {}
    for name, method in (
        ("a", PromptTuning(3)),
        ("b", PrefixTuning(2)),
        ("c", PromptTuning(4, placement="after_first")),
    ):
        prompts[name] = softhooks.attach(model, method, name)
        logits[name] = model(IDS).logits
    assert all(not torch.allclose(logits[a], logits[b]) for a in logits for b in logits if a != b)
    return model, prompts, logits


def on(model: Any, logits: dict[str | None, Tensor]) -> str | None:
    """The name of the prompt that the output belongs to."""
    found = [name for name, expected in logits.items() if torch.equal(model(IDS).logits, expected)]
    assert len(found) == 1
    return found[0]


def test_the_latest_is_on_until_another_is_activated() -> None:
    model, prompts, logits = three()
    assert on(model, logits) == "c"
    for name in ("a", "b", "c", "a"):
        assert softhooks.activate(model, name) is prompts[name]
        assert on(model, logits) == name


def test_disabled_may_be_nested_and_ends_after_an_error() -> None:
    model, _, logits = three()
    with softhooks.disabled(model) as same:
        assert same is model
        with softhooks.disabled(model):
            assert on(model, logits) is None
        assert on(model, logits) is None
        softhooks.activate(model, "b")
        assert on(model, logits) is None
    assert on(model, logits) == "b"
    with pytest.raises(KeyError), softhooks.disabled(model), softhooks.disabled(model):
        raise KeyError
    assert on(model, logits) == "b"


def test_rows_may_be_nested_and_end_after_an_error() -> None:
    model, _, logits = three()
    with softhooks.rows(model, ["a", "b"]):
        for name, row in (("a", 0), ("b", 1)):
            torch.testing.assert_close(model(IDS).logits[row], logits[name][row], rtol=1e-4, atol=1e-5)
        with softhooks.rows(model, ["c", None]):
            torch.testing.assert_close(model(IDS).logits[0], logits["c"][0], rtol=1e-4, atol=1e-5)
            with softhooks.disabled(model):
                assert on(model, logits) is None
        with pytest.raises(KeyError), softhooks.rows(model, ["c", None]):
            raise KeyError
        torch.testing.assert_close(model(IDS).logits[1], logits["b"][1], rtol=1e-4, atol=1e-5)
    assert on(model, logits) == "c"


def test_an_error_in_a_forward_leaves_the_prompt_on() -> None:
    model, _, logits = three()
    for name in logits:
        if name is not None:
            softhooks.activate(model, name)
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, 3), zoo.VOCABULARY + 5))
            assert on(model, logits) == name


def test_removing_a_prompt_while_another_is_on() -> None:
    model, prompts, logits = three()
    softhooks.activate(model, "a")
    prompts["b"].remove()
    assert on(model, logits) == "a"
    with pytest.raises(NotAttachedError, match=r"no prompt named 'b' (.|\n)*attached: *'a', 'c'"):
        softhooks.activate(model, "b")
    assert not any("soft_prompt.b" in name for name in model.state_dict())


def test_removing_the_prompt_that_is_on_turns_the_one_before_on() -> None:
    model, prompts, logits = three()
    for name, then in (("c", "b"), ("b", "a"), ("a", None)):
        prompts[name].remove()
        assert on(model, logits) == then
        prompts[name].remove()  # again: nothing happens
        assert on(model, logits) == then
    assert repr(prompts["a"]).startswith("SoftPrompt('a', PromptTuning(")
    assert "removed" in repr(prompts["a"])


def test_removing_a_prompt_that_rows_name() -> None:
    model, prompts, _ = three()
    with softhooks.rows(model, ["a", "b"]):
        prompts["b"].remove()
        with pytest.raises(NotAttachedError, match="'b'"):
            model(IDS)


def test_removing_the_last_prompt_inside_a_context() -> None:
    for context in (softhooks.disabled, lambda model: softhooks.rows(model, ["default", None])):
        model = zoo.build("llama")
        with untouched(model):
            expected = model(IDS).logits
            prompt = softhooks.attach(model, PromptTuning(3))
            with context(model):
                prompt.remove()
                assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(model(IDS).logits, expected)


def test_attaching_again_after_everything_was_removed() -> None:
    model, prompts, logits = three()
    for prompt in prompts.values():
        prompt.remove()
    assert on(model, {None: logits[None]}) is None
    with softhooks.attach(model, PromptTuning(3), "a"):
        assert not torch.equal(model(IDS).logits, logits[None])
    assert torch.equal(model(IDS).logits, logits[None])


def test_handles_in_nested_contexts() -> None:
    model = zoo.build("llama")
    with untouched(model):
        bare = model(IDS).logits
        with softhooks.attach(model, PromptTuning(3), "outer"):
            outer = model(IDS).logits
            with softhooks.attach(model, PrefixTuning(3), "inner"):
                assert not torch.equal(model(IDS).logits, outer)
            assert torch.equal(model(IDS).logits, outer)
        assert torch.equal(model(IDS).logits, bare)


def test_only_what_is_on_gets_a_gradient() -> None:
    model, prompts, _ = three()
    softhooks.activate(model, "b")
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, p in prompts.items() if any(q.grad is not None for q in p.encoder.parameters())} == {"b"}


def test_a_name_is_taken_once() -> None:
    model, prompts, logits = three()
    with untouched(model):
        message = r"names must be unique(.|\n)*attached: *'a': PromptTuning\(.*3.*\)\nasked: *'a': PrefixTuning"
        with pytest.raises(NameTakenError, match=message):
            softhooks.attach(model, PrefixTuning(5), "a")
    assert on(model, logits) == "c"
    assert prompts["a"].is_attached


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "training", "forward", "ä b"])
def test_names_that_no_submodule_can_have(name: str) -> None:
    model = zoo.build("llama")
    with untouched(model), pytest.raises(AttachError, match="letters, digits"):
        softhooks.attach(model, PromptTuning(3), name)


@pytest.mark.parametrize("name", ["en", "de-AT", "task_7", "7"])
def test_names_that_may_be(name: str) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(3), name) as prompt:
        assert prompt.name == name
