"""`PrefixTuning(scaled=True)`: the same prefix as without it, trained in units of its spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import softhooks
from softhooks import OptionError, PrefixTuning
from softhooks.methods.scaled_prefix import SMALLEST, ScaledPrefixEncoder

IDS = [21, 35, 11, 52]
SCALED = PrefixTuning(4, init_ids=IDS, scaled=True)


def encoder_of(model: Any, method: PrefixTuning) -> Any:
    with softhooks.attach(model, method) as prompt:
        return prompt.encoder


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_the_prefix_starts_as_without_units(arch: str) -> None:
    task = {"t5": "seq2seq", "bert": "sequence"}.get(arch, "causal")
    plain = encoder_of(zoo.build(arch, task), PrefixTuning(4, init_ids=IDS))
    scaled = encoder_of(zoo.build(arch, task), SCALED)
    assert scaled.groups == plain.groups
    for group in plain.groups:
        torch.testing.assert_close(scaled(group), plain(group))


def test_a_step_of_adam_moves_each_number_by_its_unit() -> None:
    encoder = encoder_of(zoo.build("llama"), SCALED)
    before = encoder("text").detach()
    (encoder("text") * torch.randn_like(before)).sum().backward()
    torch.optim.Adam(encoder.parameters(), lr=0.01).step()
    moved = (encoder("text").detach() - before).abs() / encoder.units_text
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=1e-4)


@given(rows=st.integers(2, 5), columns=st.integers(1, 6), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_units_are_the_spread_of_the_columns(rows: int, columns: int, scale: float, seed: int) -> None:
    table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    encoder = ScaledPrefixEncoder({"text": table}, 0.0)
    torch.testing.assert_close(encoder("text").detach(), table)
    units, spread = encoder.units_text, table.std(dim=0)
    assert torch.all(units >= SMALLEST * spread.mean() * 0.999)
    large = spread >= SMALLEST * spread.mean()
    torch.testing.assert_close(units[large], spread[large])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_rows_have_units_of_one(value: float) -> None:
    table = torch.full((3, 5), value)
    encoder = ScaledPrefixEncoder({"text": table}, 0.0)
    assert torch.equal(encoder("text").detach(), table)
    assert torch.equal(encoder.units_text, torch.ones(5))


def test_dropout_only_in_training() -> None:
    encoder = ScaledPrefixEncoder({"text": torch.randn(8, 64)}, 0.5)
    assert (encoder("text") == 0).any()
    assert not (encoder.eval()("text") == 0).any()


def test_a_saved_prefix_is_loaded_and_can_be_trained_further(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, SCALED) as prompt:
        with torch.no_grad():
            for rows in prompt.encoder.parameters():
                rows += torch.randn_like(rows)
        logits: Tensor = model(ids).logits.detach()
        prompt.save_pretrained(tmp_path)
    for trainable in (False, True):
        fresh = zoo.build("llama")
        with softhooks.load(fresh, tmp_path, trainable=trainable) as loaded:
            torch.testing.assert_close(fresh(ids).logits.detach(), logits)
            assert isinstance(loaded.encoder, ScaledPrefixEncoder) == trainable
            assert loaded.method.scaled


def test_a_folded_prefix_computes_the_same() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, SCALED) as prompt:
        before = model(ids).logits
        prompt.fold()
        torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.parametrize(
    ("count", "options", "found"),
    [
        (4, {"projection": True}, "projection are both True"),
        (4, {"init": "zero"}, "init='zero'"),
        (4, {"init": "random"}, "init='random'"),
        (1, {}, "1 virtual token"),
    ],
)
def test_what_has_no_spread_is_refused(count: int, options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        PrefixTuning(count, scaled=True, **options)
