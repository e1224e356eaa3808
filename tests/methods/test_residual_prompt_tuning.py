"""Residual prompt tuning: its outputs, initialization, folding, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import tokens
import torch
import toy
import zoo
from safetensors.torch import load_file
from torch.nn import functional

import softhooks
from softhooks import OptionError, PromptTuning, ResidualPromptTuning

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
P = 4


@torch.no_grad()
def stir(prompt: Any) -> None:
    for parameter in prompt.encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)


def by_hand(encoder: Any, layer_norm: bool) -> torch.Tensor:
    """`P + MLP(P)`, row by row, from the parameters alone."""
    held = dict(encoder.named_parameters())
    rows = []
    for row in held["rows"]:
        hidden = (held["down.weight"] @ row + held["down.bias"]).clamp(min=0)
        added = held["up.weight"] @ hidden + held["up.bias"]
        if layer_norm:
            added = functional.layer_norm(added, added.shape, held["norm.weight"], held["norm.bias"])
        rows.append(row + added)
    return torch.stack(rows)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj"])
def test_it_is_the_rows_and_what_one_mlp_adds(arch: str, layer_norm: bool) -> None:
    model, ids = zoo.build(arch), zoo.text(2, 7)
    with softhooks.attach(model, ResidualPromptTuning(P, hidden_size=9, layer_norm=layer_norm)) as prompt:
        stir(prompt)
        rows = by_hand(prompt.encoder, layer_norm)
        torch.testing.assert_close(prompt.encoder("embeddings"), rows)
        logits = model(ids).logits
        ours = torch.autograd.grad(logits.square().sum(), list(prompt.parameters()))
        with softhooks.disabled(model):
            expected = torch.cat([oracles.prompted(model, row[None], rows, "front", causal=True) for row in ids])
        theirs = torch.autograd.grad(expected.square().sum(), list(prompt.parameters()))
    torch.testing.assert_close(logits, expected, **CLOSE)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


STARTS: dict[str, dict[str, Any]] = {
    "vocab": {},
    "random": {"init": "random"},
    "text": {"init": "text", "init_text": "word9 word8", "tokenizer": tokens.tokenizer()},
    "class_labels": {"init": "class_labels", "init_labels": ["word5 word6", "word7"], "tokenizer": tokens.tokenizer()},
    "tensor": {"init": "tensor", "init_tensor": torch.randn(P, 32)},
}


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("start", STARTS)
def test_it_starts_as_prompt_tuning_does_bit_for_bit(start: str, layer_norm: bool) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    found = []
    for method in (PromptTuning(P, **STARTS[start]), ResidualPromptTuning(P, layer_norm=layer_norm, **STARTS[start])):
        torch.manual_seed(4)
        with softhooks.attach(model, method) as prompt, torch.no_grad():
            found.append((prompt.encoder("embeddings").clone(), model(ids).logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_only_the_last_layer_sleeps_the_others_in_the_first_step(layer_norm: bool) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    last = "norm" if layer_norm else "up"
    with softhooks.attach(model, ResidualPromptTuning(P, hidden_size=8, layer_norm=layer_norm)) as prompt:
        optimizer = torch.optim.AdamW(list(prompt.parameters()), lr=1e-2)
        for step in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            awake = {name.split(".")[0] for name, p in prompt.encoder.named_parameters() if bool((p.grad != 0).any())}
            assert awake == (
                {"rows", last} if step == 0 else {"rows", "down", "up"} | ({"norm"} if layer_norm else set())
            )
            optimizer.step()


def test_one_mlp_serves_all_rows() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, ResidualPromptTuning(P, hidden_size=8)) as prompt:
        assert prompt.num_parameters == P * 32 + (32 * 8 + 8) + (8 * 32 + 32) + 2 * 32
        stir(prompt)
        before = prompt.encoder("embeddings")
        order = torch.tensor([2, 0, 3, 1])
        with torch.no_grad():
            prompt.encoder.rows.copy_(prompt.encoder.rows[order])
        torch.testing.assert_close(prompt.encoder("embeddings"), before[order])


def test_dropout_is_on_the_mlp_in_training_only() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, ResidualPromptTuning(P, hidden_size=8, layer_norm=False, dropout=0.5)) as prompt:
        stir(prompt)
        resting = prompt.encoder("embeddings")
        assert torch.equal(resting, prompt.encoder("embeddings"))
        prompt.encoder.train()
        added = prompt.encoder("embeddings") - prompt.encoder.rows
        share = float((added == 0).float().mean())
        assert 0.3 < share < 0.7


@pytest.mark.parametrize("placement", ["front", "after_first"])
def test_what_is_saved_is_a_matrix_and_goes_on_training_from_there(tmp_path: Path, placement: Any) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    method = ResidualPromptTuning(P, hidden_size=8, placement=placement)
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        stir(prompt)
        expected = model(ids).logits
        prompt.save_pretrained(tmp_path)
    held = load_file(tmp_path / "soft_prompt.safetensors")
    assert {name: list(tensor.shape) for name, tensor in held.items()} == {"prompt.embeddings": [P, 32]}
    with softhooks.load(model, tmp_path, trainable=True) as again:
        assert torch.equal(model(ids).logits, expected)
        assert again.method == method
        optimizer = torch.optim.AdamW(list(again.parameters()), lr=1e-2)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        assert bool((again.encoder.down.weight.grad != 0).any())
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_it_learns_what_the_frozen_model_cannot_guess() -> None:
    model = toy.model()
    assert toy.share_right(model, 1) <= 0.5
    torch.manual_seed(0)
    with softhooks.attach(model, ResidualPromptTuning(P, hidden_size=64)) as prompt:
        losses = toy.tune(model, prompt, 1, lr=1e-2, steps=60)
        assert losses[-1] < 0.05 < 0.5 < losses[0]
        assert toy.share_right(model, 1) >= 0.85
        prompt.fold()
        assert toy.share_right(model, 1) >= 0.85
        prompt.verify_frozen()


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 0}, {"hidden_size": 2.5}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ResidualPromptTuning(P, **wrong)
