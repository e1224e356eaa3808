"""Rows joined after a long prefix: equal results, with one copy of the prefix's keys and values."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
import zoo
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.inject.prefix import prefix_pass

P = 24
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (6, 4, 5)]
METHODS = {"prompt": PromptTuning(P), "prefix": PrefixTuning(P)}


@pytest.fixture(autouse=True)
def _unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join rows as on devices on which attention over the prefix cannot be merged."""
    monkeypatch.setattr(prefix_pass, "can_merge", lambda *_: False)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The attention calls whose rows were joined."""
    calls: list[Any] = []
    original = prefix_pass.attend_jointly

    def spy(function: Any, prefix: Any, index: int, args: Any, kwargs: Any) -> Any:
        calls.append((args[1].shape, args[4].shape))
        return original(function, prefix, index, args, kwargs)

    monkeypatch.setattr(prefix_pass, "attend_jointly", spy)
    return calls


def outcome(model: Any, prompt: Any, batch: dict[str, Tensor], **call: Any) -> tuple[Tensor, Tensor]:
    """Logits of real tokens, and the prompt's gradient."""
    model.zero_grad()
    logits = model(**batch, **call).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits[real].square().sum().backward()
    return logits[real].detach(), next(iter(prompt.parameters())).grad.clone()


def compare(monkeypatch: pytest.MonkeyPatch, *args: Any, **call: Any) -> None:
    ours = outcome(*args, **call)
    with monkeypatch.context() as patch:
        patch.setattr(prefix_pass, "joining_pays", lambda *_: False)
        theirs = outcome(*args, **call)
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4 * float(theirs[1].abs().max()))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("arch", zoo.CAUSAL)
def test_joined_rows_give_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, joined: list[Any], arch: str, way: str, padding: str
) -> None:
    """In every family, also with sliding windows, with and without padding."""
    model = zoo.build(arch)
    batch = {"input_ids": zoo.text(3, 6)}
    if padding == "left":
        batch = naive.left_padded(ROWS)
    if padding == "right":
        batch = {key: value.flip(1) for key, value in naive.left_padded([row.flip(0) for row in ROWS]).items()}
    with softhooks.attach(model, METHODS[way]) as prompt:
        compare(monkeypatch, model, prompt, batch)
    layers = model.config.num_hidden_layers
    assert len(joined) == layers
    assert {shapes[1] for shapes in joined} == {(1, 1, 18, P + 18)}


def test_rows_that_do_not_see_all_of_the_prefix(monkeypatch: pytest.MonkeyPatch, joined: list[Any]) -> None:
    from softhooks import ContextAwarePromptTuning

    ids = zoo.text(1, P)[0].tolist()
    method = ContextAwarePromptTuning(
        context_ids=ids, token_types=[2, 2, 4, 0, 6, 8] * 1 + [0] * 18, leave_one_out=True
    )
    model = zoo.build("llama")
    with softhooks.attach(model, method) as prompt:
        compare(monkeypatch, model, prompt, naive.left_padded(ROWS), example_ids=torch.tensor([0, 1, -1]))
    assert len(joined) == 2


def test_documents_in_a_row_stay_apart(monkeypatch: pytest.MonkeyPatch, joined: list[Any]) -> None:
    model = zoo.build("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        compare(monkeypatch, model, prompt, {"input_ids": zoo.text(2, 6)}, position_ids=positions, use_cache=False)
    assert len(joined) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(monkeypatch: pytest.MonkeyPatch, joined: list[Any], reentrant: bool) -> None:
    model = naive.without_dropout(zoo.build("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        compare(monkeypatch, model, prompt, {"input_ids": zoo.text(3, 6)})
    assert joined


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_in_half_precision(monkeypatch: pytest.MonkeyPatch, joined: list[Any], precision: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(3, 6)
    with softhooks.attach(model, PromptTuning(P)):
        exact = model(ids).logits
        if precision == "bf16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            torch.testing.assert_close(model(ids).logits.float(), exact.float(), rtol=0.1, atol=0.2)
    assert len(joined) == 4


@pytest.mark.parametrize("case", ["one row", "more text than prefix", "no gradients", "a cache", "eager", "rows"])
def test_where_it_does_not_pay_or_cannot_be_nothing_is_joined(joined: list[Any], case: str) -> None:
    model = zoo.build("llama", attention="eager" if case == "eager" else "sdpa")
    ids = zoo.text(1 if case == "one row" else 3, 9 if case == "more text than prefix" else 6)
    call: dict[str, Any] = {}
    with softhooks.attach(model, PromptTuning(P)), softhooks.attach(model, PromptTuning(5), "short"):
        softhooks.activate(model, "default")
        if case == "a cache":
            with torch.no_grad():
                call["past_key_values"] = model(zoo.text(3, 2), use_cache=True).past_key_values
        if case == "rows":
            with softhooks.rows(model, ["default", "short", "default"]):
                model(ids)
        else:
            with torch.set_grad_enabled(case != "no gradients"):
                model(ids, **call)
    assert not joined


@pytest.mark.parametrize("is_joined", [True, False])
def test_what_a_training_step_keeps(monkeypatch: pytest.MonkeyPatch, is_joined: bool) -> None:
    """One copy of a long prefix instead of one per row: what autograd saves with three more rows."""
    if not is_joined:
        monkeypatch.setattr(prefix_pass, "joining_pays", lambda *_: False)
    model = zoo.build("llama", max_position_embeddings=512)
    saved: list[int] = []
    for batch in (2, 5):
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            softhooks.attach(model, PrefixTuning(400)),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            kept = model(zoo.text(batch, 6)).logits.sum()
        assert kept.requires_grad
        saved.append(sum(seen.values()))
    copies = (saved[1] - saved[0]) / (2 * 2 * 2 * 8 * 400 * 4)  # two layers, keys and values, two heads of eight, fp32
    assert (copies < 3) is is_joined
