"""Properties of every method on every architecture with every head.

Hypothesis draws the case, the text, the padding and the training; `HYPOTHESIS_PROFILE=thorough` draws many more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from drawn import BRIEF, batch_of, bits, label_of, model_of, same_bits
from hypothesis import assume, given
from hypothesis import strategies as st
from table import PAIRS, TABLE, Entry
from torch import Tensor

import softhooks
from softhooks.methods import METHODS

pytestmark = pytest.mark.hypothesis

CLOSE = {"rtol": 2e-4, "atol": 5e-5}
IDS = [f"{entry}-{case}" for entry, case in PAIRS]
BRIEF_IDS = [f"{entry}-{case}" for entry, case in BRIEF]


def anchored_at_first_column(case: zoo.Case) -> bool:
    """Whether the bare model itself depends on the padding's side: it pools column 0, or feeds shifted padding to a decoder."""
    pools_first = (case.arch in zoo.ENCODERS or case.arch in zoo.MORE_ENCODERS) and case.head == "sequence"
    return pools_first or (case.is_seq2seq and case.head != "seq2seq")


def test_every_method_is_in_the_table() -> None:
    assert {type(entry.make(4)) for entry in TABLE} == set(METHODS.values())


@pytest.mark.parametrize(("entry", "case"), PAIRS, ids=IDS)
@torch.no_grad()  # whether a weight wants a gradient decides torch's kernel, and so the last bit
def test_shapes_are_the_bare_models_and_detached_is_never_attached(entry: Entry, case: zoo.Case) -> None:
    model, ids = model_of(case), zoo.text(2, 8, end=True)
    call, extra = zoo.inputs(case, ids), entry.extra(range(2))
    bare = model(**call, output_hidden_states=True)
    keys, state = set(model.state_dict()), bits(model)
    with entry.attach(model, 3) as prompt:
        prompt.encoder.eval()
        attached = model(**call, **extra, output_hidden_states=True)
        for key, value in bare.items():
            assert _shapes(attached[key]) == _shapes(value), key
        assert not torch.equal(zoo.main_output(attached), zoo.main_output(bare))
        with softhooks.disabled(model):
            assert torch.equal(zoo.main_output(model(**call, **extra)), zoo.main_output(bare))
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
    with entry.attach(model, 3) as prompt:
        model.zero_grad()
        labels = label_of(case, ids)
        call = {k: v for k, v in zoo.inputs(case, ids).items() if not (k == "decoder_input_ids" and "labels" in labels)}
        model.train()  # an objective is not computed in evaluation
        model(**call, **labels, **entry.extra(range(2))).loss.backward()
        model.eval()
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
    with torch.no_grad(), entry.attach(model, 3) as prompt:
        prompt.encoder.eval()
        alone = [
            zoo.main_output(
                model(row[None], attention_mask=torch.ones(1, len(row)).long(), **decoder, **entry.extra([i]))
            )[0]
            for i, row in enumerate(texts)
        ]
        call = batch_of(case, [texts[i] for i in order], width, side, zoo.pad_id(model))
        if decoder:
            call["decoder_input_ids"] = decoder["decoder_input_ids"].expand(len(order), -1)
        together = zoo.main_output(model(**call, **entry.extra(order)))
    for place, row in enumerate(order):
        own = real_part(case, together, place, lengths[row], side, width)
        torch.testing.assert_close(own, alone[row], **CLOSE)


@pytest.mark.parametrize("entry", TABLE, ids=str)
@given(
    arch=st.sampled_from([*zoo.CAUSAL, *zoo.CACHED, *zoo.ENCODERS, *zoo.SEQ2SEQ]),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_folded_equals_live_bit_for_bit(entry: Entry, arch: str, tokens: int, seed: int) -> None:
    head = "seq2seq" if arch in zoo.SEQ2SEQ else "masked" if arch in zoo.ENCODERS else "sequence"
    case = zoo.Case(arch, head if entry.fits(zoo.Case(arch, head)) else "causal")
    assume(entry.fits(case))
    model, ids = model_of(case), zoo.text(2, 6, seed=seed)
    call = zoo.inputs(case, ids) | entry.extra(range(2))
    with entry.attach(model, tokens) as prompt:
        model.eval()
        live = zoo.main_output(model(**call))
        prompt.fold()
        assert torch.equal(zoo.main_output(model(**call)), live)
        prompt.fold()
        assert torch.equal(zoo.main_output(model(**call)), live)


NOT_CACHED = {
    "prompt-end": "in a causal model its slots stand behind every token that they could change",
    "p-tuning-anchors-end": "the same",
}
"""Methods that do not decode, and why; every other line of the table does."""


def test_the_methods_that_do_not_decode_are_of_the_table() -> None:
    assert NOT_CACHED.keys() <= {entry.name for entry in TABLE}


@pytest.mark.parametrize("entry", [entry for entry in TABLE if entry.name not in NOT_CACHED], ids=str)
@given(
    arch=st.sampled_from([*zoo.CAUSAL, *zoo.CACHED]),
    lengths=st.lists(st.integers(2, 6), min_size=2, max_size=3),
    seed=st.integers(0, 99),
)
def test_cached_decoding_equals_uncached(entry: Entry, arch: str, lengths: list[int], seed: int) -> None:
    case = zoo.Case(arch, "causal")
    assume(entry.fits(case))
    model = model_of(case)
    rows = [zoo.text(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]
    call = batch_of(case, rows, max(lengths), "left", zoo.PAD) | entry.extra(range(len(rows)))
    with torch.no_grad(), entry.attach(model, 3):
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
