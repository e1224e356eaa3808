"""Keys and values that are recomputed in the backward: equal gradients, less memory, and never inside other
checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch.utils.checkpoint import checkpoint
from untouched import remove_all

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.inject.prefix import recompute

P, ROWS, COLUMNS = 6, 3, 7
METHODS = {"prompt": PromptTuning(P), "prefix": PrefixTuning(P), "prefix-mlp": PrefixTuning(P, projection=True)}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    remove_all()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each saved tensor that will be recomputed instead of kept whole."""
    counted: list[int] = []
    pack = recompute._Recomputed._pack

    def count(self: Any, kept: torch.Tensor) -> Any:
        found = pack(self, kept)
        counted.extend([1] * (not isinstance(found, torch.Tensor)))
        return found

    monkeypatch.setattr(recompute._Recomputed, "_pack", count)
    return counted


def gradients(model: Any, prompt: Any, ids: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    loss = model(input_ids=ids, labels=ids, **options).loss
    return list(torch.autograd.grad(loss, list(prompt.encoder.parameters())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma3", "qwen3", "mistral"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, packed: list[int], method: str, arch: str, attention: str
) -> None:
    model = zoo.build(arch)
    model.set_attn_implementation(attention)
    ids = zoo.text(ROWS, COLUMNS)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    with softhooks.attach(model.eval(), METHODS[method]) as prompt:
        again = gradients(model, prompt, ids, attention_mask=mask)
        remakes = len(packed)
        with monkeypatch.context() as patch:
            patch.setattr(recompute, "_SHARE", float("inf"))
            kept = gradients(model, prompt, ids, attention_mask=mask)
    assert len(packed) == remakes
    assert all(map(torch.equal, again, kept))
    assert any(bool(gradient.any()) for gradient in again)
    if arch in ("gpt2", "opt"):  # in the others heads share keys, of which transformers makes copies of its own
        assert remakes == (4 if attention == "sdpa" else 3), (
            "of two layers; eager needs no keys where queries do not train"
        )


def test_what_is_kept_no_longer_grows_with_rows_times_prefix(packed: list[int]) -> None:
    model, ids = zoo.build("gpt2"), zoo.text(ROWS, COLUMNS)
    with softhooks.attach(model, METHODS["prompt"]):
        loss = model(input_ids=ids, labels=ids).loss
        assert len(packed) == 4
        loss.backward()


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, COLUMNS), (ROWS, 2 * P + 1)], ids=["one row", "a prefix that is short beside the text"]
)
def test_where_it_does_not_pay_all_is_kept(packed: list[int], rows: int, columns: int) -> None:
    model, ids = zoo.build("gpt2"), zoo.text(rows, columns)
    with softhooks.attach(model, METHODS["prompt"]):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not packed


def test_nothing_is_kept_without_gradients(packed: list[int]) -> None:
    model, ids = zoo.build("gpt2"), zoo.text(ROWS, COLUMNS)
    with softhooks.attach(model, METHODS["prompt"]), torch.no_grad():
        model(input_ids=ids)
    assert not packed


def test_others_hooks_are_left_to_see_all_that_is_kept(packed: list[int]) -> None:
    """Saved-tensor hooks of others, and checkpointed layers."""
    model, ids = zoo.build("gpt2"), zoo.text(ROWS, COLUMNS)
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        expected = gradients(model, prompt, ids)
        assert packed
        packed.clear()
        with torch.autograd.graph.save_on_cpu():
            elsewhere = gradients(model, prompt, ids)
        loss = checkpoint(lambda given: model(input_ids=given, labels=given).loss, ids, use_reentrant=False)
        again = torch.autograd.grad(loss, list(prompt.encoder.parameters()))
    assert all(map(torch.equal, elsewhere, expected))
    assert all(map(torch.equal, again, expected))
    assert not packed


def test_a_gradient_of_a_gradient() -> None:
    model, ids = zoo.build("gpt2"), zoo.text(ROWS, COLUMNS)
    model.set_attn_implementation("eager")
    found = []
    for share in (recompute._SHARE, float("inf")):
        with softhooks.attach(model.eval(), METHODS["prompt"]) as prompt, pytest.MonkeyPatch.context() as patch:
            patch.setattr(recompute, "_SHARE", share)
            rows = prompt.encoder.embeddings
            torch.manual_seed(0)
            rows.data.normal_()
            (first,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, rows, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), rows)[0])
    assert torch.equal(*found)
    assert bool(found[0].any())


def test_gradients_by_torch_func() -> None:
    model, ids = zoo.build("gpt2"), zoo.text(ROWS, COLUMNS)
    with softhooks.attach(model.eval(), METHODS["prefix"]) as prompt:
        expected = gradients(model, prompt, ids)
        given = {f"soft_prompt.default.encoder.{name}": p for name, p in prompt.encoder.named_parameters()}

        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            called = torch.func.functional_call(model, parameters, (), {"input_ids": ids, "labels": ids})
            return called.loss  # type: ignore[no-any-return]

        found = torch.func.grad(loss)(given)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found.values(), expected, strict=True))


def test_a_parameter_that_is_the_prefix_itself_is_copied() -> None:
    """An optimizer may step before an older loss goes backward, and a fused one does not change the parameter's version."""
    parameter = torch.nn.Parameter(torch.randn(1, P, 2))
    text = torch.randn(ROWS, 1, P, 2)
    prefix = recompute.KeyValues({0: parameter[None]}, {0: parameter[None]})
    whole = prefix.before(0, text, text)
    with recompute.recomputed(prefix, 0, (text, text), whole):
        squared = (whole[0] * whole[1]).sum()
    squared.backward(retain_graph=True)
    assert parameter.grad is not None
    expected = parameter.grad.clone()
    torch.optim.AdamW([parameter], lr=1.0, fused=True).step()
    (late,) = torch.autograd.grad(squared, parameter)
    assert torch.equal(late, expected)


def test_text_that_is_written_over_is_an_error_as_without_a_prompt() -> None:
    parts = torch.randn(1, 1, P, 2, requires_grad=True) * 1, torch.randn(ROWS, 1, P, 2, requires_grad=True) * 1
    prefix = recompute.KeyValues({0: parts[0]}, {0: parts[0]})
    whole = prefix.before(0, parts[1], parts[1])
    with recompute.recomputed(prefix, 0, (parts[1], parts[1]), whole):
        squared = (whole[0] * whole[1]).sum()
    parts[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        squared.backward()
