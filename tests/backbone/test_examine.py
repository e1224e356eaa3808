"""How many forwards it takes to examine a model, and models that take one row at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import zoo
from torch import nn

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.backbone.dependence import reads_ids
from softhooks.backbone.examine import examine


@pytest.mark.parametrize(("arch", "head", "forwards"), [("llama", "causal", 8), ("bert", "sequence", 7)])
def test_a_model_is_examined_in_few_forwards(arch: str, head: str, forwards: int) -> None:
    model = zoo.build(arch, head)
    stack = examine(model).entry.module
    count: Counter[str] = Counter()
    handle = stack.register_forward_pre_hook(lambda *_: count.update(["forward"]))
    structure = examine(model)
    assert count["forward"] == forwards
    assert not reads_ids(model, structure)
    assert count["forward"] == forwards + 1
    assert not reads_ids(model, structure)
    assert count["forward"] == forwards + 1, "measured once"
    handle.remove()


def _one_row_only(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    if len(kwargs["input_ids"]) > 1:
        raise ValueError("one row only")


@pytest.mark.parametrize("arch", ["llama", "mistral", "opt"])
def test_a_model_that_takes_one_row_is_found_to_be_the_same(arch: str) -> None:
    expected = examine(zoo.build(arch)).entry
    model = zoo.build(arch)
    handle = model.register_forward_pre_hook(_one_row_only, with_kwargs=True)
    structure = examine(model)
    assert structure.entry.causal
    assert not reads_ids(model, structure)
    assert [site.is_windowed for site in structure.entry.sites] == [site.is_windowed for site in expected.sites]
    assert structure.entry.injection == expected.injection == "attention"
    handle.remove()


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=["prompt", "prefix"])
def test_examining_leaves_no_mark(method: Any) -> None:
    model = zoo.build("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    softhooks.attach(model, method).remove()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
