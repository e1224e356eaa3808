"""The state of a running call is freed when the call ends, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from untouched import remove_all

import softhooks
from softhooks.runtime import stack_forward
from softhooks.runtime.dispatch import open_pass

IDS = zoo.text(2, 8)
PACKED = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}
KINDS: dict[str, tuple[softhooks.Method, dict[str, Any]]] = {
    "prefix": (softhooks.PrefixTuning(4), {}),
    "prefix, made by an MLP": (softhooks.PrefixTuning(4, projection=True), {}),
    "shared": (softhooks.PromptTuning(4), {}),
    "slots": (softhooks.PromptTuning(4), {"injection": "slots"}),
    "adapter": (softhooks.LlamaAdapter(4), {}),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """The passes of all forwards in the test; the garbage collector is off."""
    made: list[weakref.ref[Any]] = []

    def recorded(*args: Any) -> Any:
        opened = open_pass(*args)
        made.append(weakref.ref(opened))
        return opened

    monkeypatch.setattr(stack_forward, "open_pass", recorded)
    yield made
    gc.enable()
    remove_all()


def _only_later_passes(passes: list[weakref.ref[Any]]) -> None:
    gc.collect()
    gc.disable()
    passes.clear()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "packed"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS if kind != "slots")]
)
def test_a_training_step_keeps_no_pass(passes: list[weakref.ref[Any]], kind: str, arch: str, packed: bool) -> None:
    model, (method, options) = zoo.build(arch), KINDS[kind]
    softhooks.attach(model, method, **options)
    _only_later_passes(passes)
    model(input_ids=IDS, labels=IDS, use_cache=False, **(PACKED if packed else {})).loss.backward()
    assert passes
    assert not any(made() is not None for made in passes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_keeps_no_pass(passes: list[weakref.ref[Any]], kind: str) -> None:
    model, (method, options) = zoo.build("llama").eval(), KINDS[kind]
    softhooks.attach(model, method, **options)
    _only_later_passes(passes)
    model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert len(passes) >= 4
    assert not any(made() is not None for made in passes)


def test_a_refused_forward_keeps_no_pass(passes: list[weakref.ref[Any]]) -> None:
    model = zoo.build("llama").eval()
    softhooks.attach(model, softhooks.PrefixTuning(4))
    _only_later_passes(passes)
    with pytest.raises(softhooks.UnsupportedModeError):  # with a mask, transformers does not separate the documents
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **PACKED)
    assert passes
    assert not any(made() is not None for made in passes)
