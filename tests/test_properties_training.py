"""Properties of training and of errors, for every method; Hypothesis draws the architecture and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from drawn import BRIEF, batch_of, bits, label_of, model_of, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from table import PAIRS, TABLE, Entry
from untouched import differences, snapshot

pytestmark = pytest.mark.hypothesis

FEW = settings(max_examples=max(3, settings.default.max_examples // 5))
"""For tests that run over every method and draw the architecture."""


def turned(entry: Entry, items: list[Any]) -> st.SearchStrategy[Any]:
    """One of these; of a few examples one is always the first, which is another for each method."""
    start = 5 * TABLE.index(entry) % len(items)
    return st.sampled_from(items[start:] + items[:start])


def cases_of(entry: Entry, pairs: list[tuple[Entry, zoo.Case]]) -> list[zoo.Case]:
    return [case for one, case in pairs if one is entry]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}
PRECISIONS = ["fp32", "bf16", "autocast-bf16", "autocast-fp16"]


@pytest.mark.parametrize("entry", TABLE, ids=str)
@FEW
@given(data=st.data(), short=st.integers(3, 6), fails=st.booleans(), seed=st.integers(0, 1000))
def test_training_moves_the_prompt_and_no_frozen_bit(
    entry: Entry, data: st.DataObject, short: int, fails: bool, seed: int
) -> None:
    """Also with weight decay and momentum, in every precision, padded on either side, and after a forward that raised."""
    case = data.draw(turned(entry, cases_of(entry, BRIEF)), "case")
    optimizer = data.draw(turned(entry, sorted(OPTIMIZERS)), "optimizer")
    precision = data.draw(turned(entry, PRECISIONS), "precision")
    side = data.draw(turned(entry, ["left", "right"]), "side")
    model = zoo.build(case.arch, case.head, seed=seed)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    before = bits(model)
    rows = [zoo.text(1, length, seed=seed + length, end=True)[0] for length in (6, short)]
    padded = batch_of(case, rows, 6, side, zoo.pad_id(model))
    call = padded | label_of(case, padded["input_ids"], padded["attention_mask"]) | entry.extra(range(2))
    if case.head == "seq2seq":
        del call["decoder_input_ids"]
    given_bits = {name: tensor.clone() for name, tensor in call.items()}
    dtype = torch.float16 if precision.endswith("fp16") else torch.bfloat16
    with entry.attach(model, 2) as prompt:
        model.train()
        start = [q.detach().clone() for q in prompt.parameters()]
        stepper = OPTIMIZERS[optimizer](list(prompt.parameters()))
        assert all(q.dtype == torch.float32 for q in prompt.parameters())
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype, enabled=precision.startswith("autocast")):
                model(**call).loss.backward()
            stepper.step()
            stepper.zero_grad()
            assert all(torch.equal(call[name], given_bits[name]) for name in call), "a caller's tensor was modified"
        if fails:
            with pytest.raises(Exception, match=r".*"):
                model(torch.full((1, 3), 10**6))
        assert all(not torch.equal(a, b) for a, b in zip(start, prompt.parameters(), strict=True))
        assert prompt.verify_frozen().tensors > 0
        assert same_bits(before, model)
    assert same_bits(before, model)


@pytest.mark.parametrize("entry", TABLE, ids=str)
@FEW
@given(data=st.data(), seed=st.integers(0, 99))
def test_everything_is_put_back_after_an_error(entry: Entry, data: st.DataObject, seed: int) -> None:
    """A forward that raises in any layer leaves no hook, flag or pass behind; the next one is right, and so is the bare model."""
    case = data.draw(turned(entry, cases_of(entry, PAIRS)), "case")
    model, ids = model_of(case), zoo.text(2, 7, seed=seed, end=True)
    call = zoo.inputs(case, ids) | entry.extra(range(2))
    never_attached = snapshot(model)
    with entry.attach(model, 3) as prompt:
        model.eval()
        expected = zoo.main_output(model(**call))
        stack = data.draw(st.sampled_from(prompt.prompted_model.structure.stacks), "stack")
        layers = next(m for m in stack.module.modules() if isinstance(m, torch.nn.ModuleList))
        before = snapshot(model)

        def explode(*_: Any) -> None:
            raise ArithmeticError("in the middle of a forward")

        handle = data.draw(st.sampled_from(list(layers)), "layer").register_forward_hook(explode)
        with pytest.raises(ArithmeticError):
            model(**call)
        handle.remove()
        assert all(stack.state.current is None for stack in prompt.prompted_model.structure.stacks)
        assert not differences(before, snapshot(model))
        assert torch.equal(zoo.main_output(model(**call)), expected)
    assert not differences(never_attached, snapshot(model))
