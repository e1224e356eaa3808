"""Callers of `model.forward` bypass hooks: they are refused, unless an integration routes them through the hooks."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import zoo
from table import BY_NAME
from untouched import remove_all, untouched

import softhooks
from softhooks import PromptNotReachedError, PromptTuning
from softhooks.runtime.direct_forward import route_direct_calls
from softhooks.runtime.prompted_model import require_prompted_model

CASES = [
    ("prompt", "llama", "causal"),
    ("prompt", "bert", "sequence"),
    ("prefix", "bert", "sequence"),
    ("adapter", "qwen3", "causal"),
]


@pytest.fixture(autouse=True)
def _clean():
    remove_all()


def _bare(model):  # the stack itself, as embedding models are
    return model.base_model


@pytest.mark.parametrize(("entry", "arch", "head"), CASES)
def test_a_direct_forward_equals_a_call(entry, arch, head):
    model = _bare(zoo.build(arch, head))
    ids = zoo.text(3, 6)
    with untouched(model):
        prompt = BY_NAME[entry].attach(model, 4)
        called = model(input_ids=ids)[0]
        signature = inspect.signature(model.forward)
        route_direct_calls(require_prompted_model(model))
        route_direct_calls(require_prompted_model(model))  # once is enough
        assert torch.equal(model.forward(input_ids=ids)[0], called)
        assert torch.equal(model(input_ids=ids)[0], called)
        assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)
        with softhooks.disabled(model):
            bare = model.forward(input_ids=ids)[0]
        assert not torch.equal(bare, called)
        prompt.remove()
    assert torch.equal(model.forward(input_ids=ids)[0], bare)


def test_without_it_a_direct_forward_is_refused():
    model = _bare(zoo.build("bert", "sequence"))
    with softhooks.attach(model, PromptTuning(4)), pytest.raises(PromptNotReachedError):
        model.forward(input_ids=zoo.text(2, 5))


def test_a_hook_that_raises_does_not_let_the_next_direct_forward_past():
    model = _bare(zoo.build("bert", "sequence"))
    ids = zoo.text(2, 5)
    with softhooks.attach(model, PromptTuning(4)):
        route_direct_calls(require_prompted_model(model))
        expected = model(input_ids=ids)[0]

        def stop(*_):
            raise RuntimeError("stop")

        handle = model.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            model.forward(input_ids=ids)
        handle.remove()
        assert torch.equal(model.forward(input_ids=ids)[0], expected)


def test_a_copy_calls_its_own_forward_and_columns_pass():
    model = _bare(zoo.build("llama"))
    softhooks.attach(model, BY_NAME["mpt-tasks"].make(3))
    route_direct_calls(require_prompted_model(model))
    ids, tasks = zoo.text(2, 5), torch.tensor([0, 1])
    expected = model(input_ids=ids, task_ids=tasks)[0]
    twin = copy.deepcopy(model)
    assert torch.equal(twin.forward(input_ids=ids, task_ids=tasks)[0], expected)
    with torch.no_grad():
        twin.embed_tokens.weight.zero_()
    assert torch.equal(model.forward(input_ids=ids, task_ids=tasks)[0], expected)
    assert not torch.equal(twin.forward(input_ids=ids, task_ids=tasks)[0], expected)
