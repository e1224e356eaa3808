"""A forward inside a hook of another forward of the same thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from paused import answer
from thread_cases import CASES, build
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import PromptTuning

NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": zoo.PAD}


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


@pytest.mark.parametrize("way", CASES)
def test_a_forward_inside_another_one_of_the_same_thread(way: str) -> None:
    """From a hook anywhere in the model, also while the prompt itself is computed."""
    model, _, calls = build(way)
    expected = [answer(call) for call in calls]
    with softhooks.disabled(model):
        bare = answer(calls[1])
    inside: list[Any] = []

    def nested(*_call: Any) -> None:
        if not busy[0]:
            busy[0] = True
            inside.append(answer(calls[1]))
            with softhooks.disabled(model):
                inside.append(answer(calls[1]))
            busy[0] = False

    busy = [False]
    for module in list(model.modules()):
        handle = module.register_forward_hook(nested)
        found = answer(calls[0])
        assert torch.equal(found, expected[0]), (type(module), found)
        handle.remove()
    assert len(inside) > 10
    assert all(
        torch.equal(found, right) for found, right in zip(inside, [expected[1], bare] * len(inside), strict=False)
    )


def test_generate_inside_a_hook() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    for name in ("a", "b"):
        softhooks.attach(model, PromptTuning(3), name)
    with softhooks.rows(model, ["a", "b"]):
        logits = answer(lambda: model(ids).logits)
        texts = model.generate(ids, num_beams=2, **NEW)
        found: list[Tensor] = []

        def nested(*_call: Any) -> None:
            handle.remove()
            found.append(model.generate(ids, num_beams=2, **NEW))

        for module in (model.model.layers[0], model.lm_head):
            handle = module.register_forward_hook(nested)
            assert torch.equal(answer(lambda: model(ids).logits), logits)
            handle = module.register_forward_hook(nested)
            assert torch.equal(model.generate(ids, num_beams=2, **NEW), texts)
    assert len(found) == 4
    assert all(torch.equal(one, texts) for one in found)


def test_an_error_before_our_hooks_ends_nobody_elses_forward() -> None:
    """Another hook raises before ours: torch still calls our last hook, inside another forward of the thread."""
    model, ids = zoo.build("llama"), zoo.text(1, 6)

    def fail(*_call: Any) -> None:
        if fails[0]:
            raise KeyError

    fails, model.fail = [False], fail
    model.register_forward_pre_hook(fail)
    model.model.register_forward_pre_hook(fail)
    softhooks.attach(model, PromptTuning(3))
    expected = answer(lambda: model(ids).logits)

    def nested(*_call: Any) -> None:
        fails[0] = True
        for asked in (model, model.model):
            with pytest.raises(KeyError):
                asked(ids)
        fails[0] = False

    for module in (model.model.layers[0], model.lm_head):
        handle = module.register_forward_hook(nested)
        assert torch.equal(answer(lambda: model(ids).logits), expected)
        handle.remove()
