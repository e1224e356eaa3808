"""Every forward equals a naive oracle on the bare model, and so do the gradients."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, PromptTuning

P, T = 4, 9
CAUSAL = (*zoo.CAUSAL, *zoo.CACHED)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def _layers_and_heads(model: Any) -> tuple[int, int]:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads  # falcon widens its few heads before they reach the cache


def _rows_of(prompt: Any) -> Tensor:
    return prompt.encoder("embeddings")


@pytest.mark.parametrize("placement", ["front", "after_first"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_prompt_tuning_on_a_decoder(arch: str, placement: Any) -> None:
    model, ids = zoo.build(arch), zoo.text(2, T)
    with softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        rows = _rows_of(prompt)
        logits = model(ids).logits
        (ours,) = torch.autograd.grad(logits.square().sum(), rows)
        with softhooks.disabled(model):
            expected = torch.cat([oracles.prompted(model, row[None], rows, placement, causal=True) for row in ids])
        (theirs,) = torch.autograd.grad(expected.square().sum(), rows)
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("arch", CAUSAL)
def test_prompt_in_slots_equals_prompt_computed_once(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(2, T)
    with softhooks.attach(model, PromptTuning(P)) as shared:
        softhooks.attach(
            model, PromptTuning(P, init="tensor", init_tensor=_rows_of(shared)), "slots", injection="slots"
        )
        in_slots = model(ids).logits
        softhooks.activate(model, "default")
        assert shared.injection == "shared"
        torch.testing.assert_close(model(ids).logits, in_slots, **CLOSE)


@pytest.mark.parametrize("arch", [a for a in CAUSAL if a != "mixtral"])
def test_prompt_tuning_in_double_precision(arch: str) -> None:
    """In fp64 the difference from the oracle is only rounding."""
    model, ids = zoo.build(arch).double(), zoo.text(2, T)
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        logits = model(ids).logits
        with softhooks.disabled(model):
            rows = _rows_of(prompt)
            expected = torch.cat([oracles.prompted(model, row[None], rows, "front", causal=True) for row in ids])
    tolerance = 1e-10 if arch in ("gpt2", "opt", "bloom") else 2e-5  # rotary tables are fp32
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("arch", CAUSAL)
def test_prefix_tuning_on_a_decoder(arch: str, projection: bool) -> None:
    model, ids = zoo.build(arch), zoo.text(2, T)
    with softhooks.attach(model, PrefixTuning(P, projection=projection, hidden_size=8)) as prompt:
        table = prompt.encoder("text").detach().requires_grad_()
        logits = model(ids).logits
        keys, values = oracles.cut_table(table, *_layers_and_heads(model))
        with softhooks.disabled(model):
            expected = torch.cat([oracles.prefixed(model, row[None], keys, values) for row in ids])
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "qwen3"])
def test_prefix_tuning_is_bit_identical_to_a_seeded_cache(arch: str) -> None:
    model, ids = zoo.build(arch, attention="eager"), zoo.text(1, T)
    with softhooks.attach(model, PrefixTuning(P)) as prompt:
        logits = model(ids).logits
        keys, values = oracles.cut_table(prompt.encoder("text"), *_layers_and_heads(model))
        with softhooks.disabled(model):
            assert torch.equal(logits, oracles.prefixed(model, ids, keys, values))


@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
@pytest.mark.parametrize("head", ["tokens", "masked"])
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_prompt_tuning_on_an_encoder(arch: str, head: str, placement: Any) -> None:
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        logits = model(ids).logits
        rows = _rows_of(prompt)
        with softhooks.disabled(model):
            expected = torch.cat([oracles.prompted(model, row[None], rows, placement, causal=False) for row in ids])
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
def test_a_pooler_sees_the_first_token_and_not_the_prompt(placement: Any) -> None:
    model, ids = zoo.build("bert", "sequence"), zoo.text(2, T)
    with softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        logits = model(ids).logits
        rows = _rows_of(prompt)
    embedded = model.get_input_embeddings()(ids)
    wide = torch.cat([oracles.concatenated(row[None], rows, placement) for row in embedded])
    states = model.bert(inputs_embeds=wide).last_hidden_state
    own = torch.cat([oracles.text_states(row[None], P, placement, causal=False) for row in states])
    torch.testing.assert_close(logits, model.classifier(model.bert.pooler(own)), **CLOSE)


@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_prompt_tuning_on_an_encoder_decoder(arch: str, placement: Any) -> None:
    model, ids = zoo.build(arch, "seq2seq"), zoo.text(2, T)
    decoder_ids = zoo.text(2, 5, seed=3)
    with softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        output = model(input_ids=ids, decoder_input_ids=decoder_ids)
        rows = _rows_of(prompt)
        with softhooks.disabled(model):
            expected = [
                oracles.prompted(model, row[None], rows, placement, causal=False, decoder_input_ids=ids_of[None])
                for row, ids_of in zip(ids, decoder_ids, strict=True)
            ]
    torch.testing.assert_close(output.logits, torch.cat(expected), **CLOSE)
    assert output.encoder_last_hidden_state.shape == (2, T, 32)


def _tables(prompt: Any, model: Any, group: str) -> list[tuple[Tensor, Tensor]]:
    keys, values = oracles.cut_table(prompt.encoder(group), 2, 4)
    return list(zip(keys, values, strict=True))


@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_prefix_tuning_on_an_encoder(arch: str) -> None:
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with softhooks.attach(model, PrefixTuning(P)) as prompt:
        logits = model(ids).logits
        with softhooks.disabled(model), oracles.patched_attention(_tables(prompt, model, "text")):
            expected = model(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_prefix_tuning_on_an_encoder_decoder_has_three_prefixes(arch: str) -> None:
    model, ids, decoder_ids = zoo.build(arch, "seq2seq"), zoo.text(2, T), zoo.text(2, 5, seed=3)
    with softhooks.attach(model, PrefixTuning(P)) as prompt:
        assert set(prompt.encoder.groups) == {"encoder", "decoder", "cross"}
        logits = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        logits.square().sum().backward()
        assert all(bool((q.grad.abs().sum(-1) > 0).all()) for q in prompt.parameters())
        decoder = [
            pair
            for both in zip(_tables(prompt, model, "decoder"), _tables(prompt, model, "cross"), strict=True)
            for pair in both
        ]
        order = [*_tables(prompt, model, "encoder"), *decoder]
        with softhooks.disabled(model), oracles.patched_attention(order):
            expected = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", ["gemma3", "mistral"])
def test_a_prefix_that_every_token_sees_is_an_option_on_sliding_layers(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(1, 16)
    with softhooks.attach(model, PrefixTuning(P, windowed=False)):
        everywhere = model(ids).logits
    torch.manual_seed(0)
    with softhooks.attach(model, PrefixTuning(P)):
        windowed = model(ids).logits
    assert not torch.allclose(everywhere[:, -1], windowed[:, -1], atol=1e-4)


def test_prefix_positions_shift_or_stay() -> None:
    model, ids = zoo.build("gpt2"), zoo.text(1, T)
    for shift, first in ((True, P), (False, 0)):
        with softhooks.attach(model, PrefixTuning(P, shift_positions=shift)) as prompt:
            logits = model(ids).logits
            keys, values = oracles.cut_table(prompt.encoder("text"), 2, 4)
            with softhooks.disabled(model):
                cache = oracles.seeded_cache(model, keys, values)
                positions = torch.arange(first, first + T)[None]
                expected = model(ids, past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(logits, expected, **CLOSE)
