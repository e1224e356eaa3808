"""What is always true, for every method on every architecture with every head.

Hypothesis draws the case, the text, the padding and the training; `HYPOTHESIS_PROFILE=thorough` draws many more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from table import PAIRS, TABLE, Entry
from torch import Tensor

import softhooks

pytestmark = pytest.mark.hypothesis

CLOSE = {"rtol": 2e-4, "atol": 5e-5}
IDS = [f"{entry}-{case}" for entry, case in PAIRS]
BRIEF = [(e, c) for e, c in PAIRS if (c.head in ("causal", "seq2seq") or c.arch in ("bert", "roberta", "llama"))]
BRIEF_IDS = [f"{entry}-{case}" for entry, case in BRIEF]


@cache
def model_of(case: zoo.Case) -> Any:
    return zoo.build(case.arch, case.head)


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(before: dict[str, Tensor], model: Any) -> bool:
    after = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if not n.startswith("soft_prompt.")}
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def anchored_at_first_column(case: zoo.Case) -> bool:
    """Whether the bare model itself depends on the padding's side: it pools column 0, or feeds shifted padding to a decoder."""
    pools_first = case.arch in zoo.ENCODERS and case.head == "sequence"
    return pools_first or (case.is_seq2seq and case.head != "seq2seq")


def label_of(case: zoo.Case, ids: Tensor) -> dict[str, Tensor]:
    rows = ids.shape[0]
    if case.head in ("causal", "masked", "tokens"):
        return {"labels": ids % 3 if case.head == "tokens" else ids}
    if case.head == "seq2seq":
        return {"labels": zoo.text(rows, 4, seed=5)}
    if case.head == "qa":
        return {"start_positions": torch.ones(rows, dtype=torch.long), "end_positions": torch.full((rows,), 2)}
    return {"labels": torch.arange(rows) % 3}


@pytest.mark.parametrize(("entry", "case"), PAIRS, ids=IDS)
@torch.no_grad()  # whether a weight wants a gradient decides torch's kernel, and so the last bit
def test_shapes_are_the_bare_models_and_detached_is_never_attached(entry: Entry, case: zoo.Case) -> None:
    model, ids = model_of(case), zoo.text(2, 8, end=True)
    call = zoo.inputs(case, ids)
    bare = model(**call, output_hidden_states=True)
    keys, state = set(model.state_dict()), bits(model)
    with softhooks.attach(model, entry.make(3)) as prompt:
        prompt.encoder.eval()
        attached = model(**call, output_hidden_states=True)
        for key, value in bare.items():
            assert _shapes(attached[key]) == _shapes(value), key
        assert not torch.equal(zoo.main_output(attached), zoo.main_output(bare))
        with softhooks.disabled(model):
            assert torch.equal(zoo.main_output(model(**call)), zoo.main_output(bare))
    assert torch.equal(zoo.main_output(model(**call)), zoo.main_output(bare))
    assert set(model.state_dict()) == keys
    assert same_bits(state, model)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return [_shapes(item) for item in value] if isinstance(value, (tuple, list)) else type(value)


@pytest.mark.parametrize(("entry", "case"), PAIRS, ids=IDS)
def test_gradients_reach_the_prompt_and_nothing_else(entry: Entry, case: zoo.Case) -> None:
    model, ids = model_of(case), zoo.text(2, 8, end=True)
    with softhooks.attach(model, entry.make(3)) as prompt:
        model.zero_grad()
        labels = label_of(case, ids)
        call = {k: v for k, v in zoo.inputs(case, ids).items() if not (k == "decoder_input_ids" and "labels" in labels)}
        loss = model(**call, **labels).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("soft_prompt."):
                assert parameter.grad is not None, name
                # A bias that is equal in every column cannot move a distribution over columns.
                assert bool(parameter.grad.abs().sum() > 0) or name.endswith("qa_outputs.bias"), name
            else:
                assert parameter.grad is None, name
        assert {id(q) for q in prompt.parameters()} == {id(q) for q in model.parameters() if q.requires_grad}


@st.composite
def padded(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Row lengths, an order of the rows, and a seed."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=2, max_size=4))
    order = draw(st.permutations(range(len(lengths))))
    return lengths, list(order), draw(st.integers(0, 1000))


def batch_of(case: zoo.Case, rows: list[Tensor], width: int, side: str, pad: int) -> dict[str, Tensor]:
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return zoo.inputs(case, ids, mask)


def real_part(case: zoo.Case, output: Tensor, row: int, length: int, side: str, width: int) -> Tensor:
    per_token = case.head in ("causal", "masked", "tokens", "qa")
    if not per_token:
        return output[row]
    return output[row, :length] if side == "right" else output[row, width - length :]


@pytest.mark.parametrize(("entry", "case"), BRIEF, ids=BRIEF_IDS)
@given(drawn=padded(), extra=st.integers(0, 3), side=st.sampled_from(["left", "right"]))
def test_row_order_padding_side_and_amount_change_nothing(
    entry: Entry, case: zoo.Case, drawn: tuple[list[int], list[int], int], extra: int, side: str
) -> None:
    if anchored_at_first_column(case):
        side = "right"
    if case.is_seq2seq and case.head != "seq2seq":
        extra = 0
    lengths, order, seed = drawn
    model = model_of(case)
    texts = [zoo.text(1, n, seed=seed + i, end=True)[0] for i, n in enumerate(lengths)]
    decoder = {"decoder_input_ids": zoo.text(1, 4, seed=99)} if case.head == "seq2seq" else {}
    torch.manual_seed(seed)
    width = max(lengths) + extra
    with torch.no_grad(), softhooks.attach(model, entry.make(3)) as prompt:
        prompt.encoder.eval()
        alone = [
            zoo.main_output(model(row[None], attention_mask=torch.ones(1, len(row)).long(), **decoder))[0]
            for row in texts
        ]
        call = batch_of(case, [texts[i] for i in order], width, side, zoo.pad_id(model))
        if decoder:
            call["decoder_input_ids"] = decoder["decoder_input_ids"].expand(len(order), -1)
        together = zoo.main_output(model(**call))
    for place, row in enumerate(order):
        own = real_part(case, together, place, lengths[row], side, width)
        torch.testing.assert_close(own, alone[row], **CLOSE)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


@given(
    pair=st.sampled_from(BRIEF),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    precision=st.sampled_from(["fp32", "bf16", "autocast-bf16", "autocast-fp16"]),
    fails=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_training_moves_the_prompt_and_no_frozen_bit(
    pair: tuple[Entry, zoo.Case], optimizer: str, precision: str, fails: bool, seed: int
) -> None:
    """Also with weight decay and momentum, in every precision, and after a forward that raised."""
    entry, case = pair
    model = zoo.build(case.arch, case.head, seed=seed)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    before = bits(model)
    ids = zoo.text(2, 6, seed=seed, end=True)
    given_ids, given_bits = ids.clone(), {}
    dtype = torch.float16 if precision.endswith("fp16") else torch.bfloat16
    with softhooks.attach(model, entry.make(2)) as prompt:
        model.train()
        start = [q.detach().clone() for q in prompt.parameters()]
        stepper = OPTIMIZERS[optimizer](list(prompt.parameters()))
        assert all(q.dtype == torch.float32 for q in prompt.parameters())
        for _ in range(2):
            labels = label_of(case, ids)
            call = {
                k: v for k, v in zoo.inputs(case, ids).items() if not (k == "decoder_input_ids" and "labels" in labels)
            }
            given_bits = {k: v.clone() for k, v in call.items()}
            with torch.autocast("cpu", dtype=dtype, enabled=precision.startswith("autocast")):
                model(**call, **labels).loss.backward()
            stepper.step()
            stepper.zero_grad()
            assert all(torch.equal(call[k], given_bits[k]) for k in call), "a caller's tensor was modified"
        if fails:
            with pytest.raises(Exception, match=r".*"):
                model(torch.full((1, 3), 10**6))
        assert all(not torch.equal(a, b) for a, b in zip(start, prompt.parameters(), strict=True))
        assert prompt.verify_frozen().tensors > 0
        assert same_bits(before, model)
        assert torch.equal(ids, given_ids)
    assert same_bits(before, model)


@pytest.mark.parametrize("entry", TABLE, ids=str)
@given(
    arch=st.sampled_from([*zoo.CAUSAL, *zoo.CACHED, *zoo.ENCODERS, *zoo.SEQ2SEQ]),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_folded_equals_live_bit_for_bit(entry: Entry, arch: str, tokens: int, seed: int) -> None:
    head = "seq2seq" if arch in zoo.SEQ2SEQ else "masked" if arch in zoo.ENCODERS else "sequence"
    case = zoo.Case(arch, head)
    model, ids = model_of(case), zoo.text(2, 6, seed=seed)
    with softhooks.attach(model, entry.make(tokens)) as prompt:
        model.eval()
        live = zoo.main_output(model(**zoo.inputs(case, ids)))
        prompt.fold()
        assert torch.equal(zoo.main_output(model(**zoo.inputs(case, ids))), live)
        prompt.fold()
        assert torch.equal(zoo.main_output(model(**zoo.inputs(case, ids))), live)


@pytest.mark.parametrize(
    "entry", [e for e in TABLE if e.name in ("prompt", "prompt-after-first", "prefix", "prefix-mlp")], ids=str
)
@given(
    arch=st.sampled_from([*zoo.CAUSAL, *zoo.CACHED]),
    lengths=st.lists(st.integers(2, 6), min_size=2, max_size=3),
    seed=st.integers(0, 99),
)
def test_cached_decoding_equals_uncached(entry: Entry, arch: str, lengths: list[int], seed: int) -> None:
    case = zoo.Case(arch, "causal")
    model = model_of(case)
    rows = [zoo.text(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]
    call = batch_of(case, rows, max(lengths), "left", zoo.PAD)
    with torch.no_grad(), softhooks.attach(model, entry.make(3)):
        model.eval()
        options: dict[str, Any] = {
            "max_new_tokens": 4,
            "do_sample": False,
            "pad_token_id": zoo.PAD,
            "output_logits": True,
        }
        cached = model.generate(**call, **options, return_dict_in_generate=True)
        plain = model.generate(**call, **options, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def every_name(model: Any) -> Iterator[str]:
    yield from (name for name, _ in model.named_modules())


@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 99))
def test_everything_is_put_back_after_an_error(pair: tuple[Entry, zoo.Case], seed: int) -> None:
    """A forward that raises in the middle leaves no pass open, and the next forward is right."""
    entry, case = pair
    model, ids = model_of(case), zoo.text(2, 7, seed=seed, end=True)
    call = zoo.inputs(case, ids)
    names = list(every_name(model))
    with softhooks.attach(model, entry.make(3)) as prompt:
        model.eval()
        expected = zoo.main_output(model(**call))
        stack = prompt.host.anatomy.stacks[-1]
        layer = next(m for m in stack.module.modules() if isinstance(m, torch.nn.ModuleList))[0]

        def explode(*_: Any) -> None:
            raise ArithmeticError("in the middle of a forward")

        handle = layer.register_forward_hook(explode)
        with pytest.raises(ArithmeticError):
            model(**call)
        handle.remove()
        assert all(stack.live is None for stack in prompt.host.anatomy.stacks)
        assert torch.equal(zoo.main_output(model(**call)), expected)
    assert list(every_name(model)) == names
