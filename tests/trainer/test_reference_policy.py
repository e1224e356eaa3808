"""A model as its own reference: the bare model, or one of its inactive prompts, whatever the policy does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from paused import Paused, answer
from thread_cases import Waits
from untouched import remove_all, untouched

import softhooks
from softhooks import NotAttachedError, PrefixTuning, PromptTuning, TrainerError
from softhooks.trainer.reference_policy import Reference

IDS = zoo.text()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def test_it_answers_as_the_bare_model_in_evaluation_does() -> None:
    model = zoo.build("llama", attention_dropout=0.5)
    bare = model(input_ids=IDS).logits
    states = model.model(input_ids=IDS).last_hidden_state
    reference = Reference(model)
    softhooks.attach(model, PromptTuning(4))
    model.train()
    drawn = torch.get_rng_state()
    with untouched(model):
        assert torch.equal(reference(input_ids=IDS).logits, bare)
        assert torch.equal(reference.base_model(input_ids=IDS).last_hidden_state, states)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not reference(input_ids=IDS).logits.requires_grad
    assert (model(input_ids=IDS).logits - bare).abs().max() > 0.1
    assert reference.config is model.config
    assert reference.get_output_embeddings() is model.lm_head


def test_what_is_done_to_it_does_not_reach_the_policy() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    reference = Reference(model)
    with untouched(model):
        reference.train().to(torch.float64).requires_grad_(False)
    assert not list(reference.parameters())


def test_its_state_is_that_of_what_it_runs() -> None:
    model = zoo.build("llama")
    bare = model.state_dict()
    softhooks.attach(model, PromptTuning(2), "other")
    softhooks.attach(model, PromptTuning(4))
    assert training.equal(Reference(model).state_dict(), bare)
    other = Reference(model, "other").state_dict()
    assert {name.rpartition(".")[0] for name in other if name not in bare} == {"soft_prompt.other.encoder"}


def test_it_runs_with_a_prompt_that_rests(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PrefixTuning(3)) as before:
        before.save_pretrained(tmp_path)
        with torch.no_grad():
            wanted = model(input_ids=IDS).logits
    softhooks.load(model, tmp_path, name="before")
    softhooks.attach(model, PromptTuning(4))
    with untouched(model):
        torch.testing.assert_close(Reference(model, "before")(input_ids=IDS).logits, wanted)
        with softhooks.rows(model, ["default", None]), softhooks.disabled(model):
            torch.testing.assert_close(Reference(model, "before")(input_ids=IDS).logits, wanted)
    assert softhooks.SoftPrompt is type(softhooks.activate(model, "default"))


def test_one_that_would_move_or_is_not_there_is_refused() -> None:
    model = zoo.build("llama")
    with pytest.raises(TrainerError, match=r"model.embed_tokens.weight of the reference model is being trained"):
        Reference(model)(input_ids=IDS)
    with pytest.raises(NotAttachedError):
        Reference(model, "before")(input_ids=IDS)
    softhooks.attach(model, PromptTuning(4), trainable="lm_head*")
    with (
        untouched(model),
        pytest.raises(
            TrainerError,
            match=r"lm_head.weight of the reference model(.|\n)*with no prompt(.|\n)*1 tensors",
        ),
    ):
        Reference(model)(input_ids=IDS)
    with pytest.raises(TrainerError, match=r"the prompt 'default'"):
        Reference(model, "default").base_model(input_ids=IDS)


def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    monkeypatch.setattr("softhooks.trainer.reference_policy.is_sharded_model", lambda model: True)
    with (
        untouched(model),
        pytest.raises(TrainerError, match=r"cannot be its own reference(.|\n)*another model as `ref_model`"),
    ):
        Reference(model)(input_ids=IDS)


@pytest.mark.parametrize("way", ["forward", "base_model"])
def test_no_other_thread_runs_the_model_in_the_mode_of_the_reference(way: str) -> None:
    model = zoo.build("llama").train()
    softhooks.attach(model, PrefixTuning(4))
    reference = Reference(model)
    call = reference if way == "forward" else reference.base_model
    found: list[Any] = []
    waits = Waits(model)

    def other() -> None:
        found.append(answer(lambda: model(input_ids=IDS).logits))
        waits.begun.set()  # also if it did not wait

    with Paused(lambda: call(input_ids=IDS), model.model.layers[0]) as first:
        modes: list[bool] = []
        handle = model.model.layers[1].register_forward_hook(lambda module, *_: modes.append(module.training))
        thread = threading.Thread(target=other)
        thread.start()
        assert waits.begun.wait(300)
    thread.join()
    handle.remove()
    assert not isinstance(first.result, Exception), first.result
    assert not isinstance(found[0], Exception), found[0]
    assert modes == [False, True]
