"""Adapters of different lengths, layers, gates, factors, contexts and heads in one batch; and learning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapters
import naive
import pytest
import torch
import zoo
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModeError

NEW = 5
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3, 5)]
NAMES = ["a", "b", None, "a"]
METHODS = {
    "a": LlamaAdapter(5, num_layers=1, gate="raw"),
    "b": LlamaAdapter(2),
}
SCALED = {"a": LlamaAdapter(5, scale_and_bias=True), "b": LlamaAdapter(2, gate="raw")}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def prompted(arch: str, head: str = "causal", methods: dict[str, LlamaAdapter] = METHODS) -> tuple[Any, dict[str, Any]]:
    model = naive.endless(zoo.build(arch, head)) if head == "causal" else zoo.build(arch, head)
    model.requires_grad_(False)
    return model, {n: adapters.stir(softhooks.attach(model, m, n), 1.0) for n, m in methods.items()}


def right_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    flipped = naive.left_padded([row.flip(0) for row in rows])
    return {key: value.flip(1) for key, value in flipped.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("arch", "methods"), [(a, METHODS) for a in zoo.CAUSAL] + [(a, SCALED) for a in zoo.CAUSAL if a != "opt"]
)
@torch.no_grad()
def test_each_row_of_a_forward(arch: str, side: str, methods: dict[str, LlamaAdapter]) -> None:
    model, prompts = prompted(arch, methods=methods)
    batch = naive.left_padded(ROWS) if side == "left" else right_padded(ROWS)
    with softhooks.rows(model, NAMES):
        together = model(**batch).logits
    for logits, mask, name, row in zip(together, batch["attention_mask"], NAMES, ROWS, strict=True):
        if name is None:
            with softhooks.disabled(model):
                alone = model(row[None]).logits[0]
        elif methods[name].scale_and_bias:
            softhooks.activate(model, name)
            alone = model(row[None]).logits[0]
        else:
            alone = adapters.naive(model, prompts[name], input_ids=row[None])[0]
        torch.testing.assert_close(logits[mask.bool()], alone, **CLOSE)


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_each_row_of_generate_with_its_own_context(arch: str, more: dict[str, Any]) -> None:
    model, prompts = prompted(arch)
    context = torch.randn(4, 32)
    with softhooks.rows(model, NAMES):
        found = model.generate(
            **naive.left_padded(ROWS), prompt_context=context, max_new_tokens=NEW, do_sample=False, **more
        )
    for ours, name, row, own in zip(found, NAMES, ROWS, context, strict=True):

        def step(ids: Tensor, name: str | None = name, own: Tensor = own) -> Tensor:
            if name is None:
                with softhooks.disabled(model):
                    return model(ids[None], use_cache=False).logits[0, -1]
            return adapters.naive(model, prompts[name], own[None], input_ids=ids[None], use_cache=False)[0, -1]

        expected = naive.beam(step, row, 3, NEW) if more.get("num_beams") else naive.greedy(step, row, NEW)
        assert torch.equal(ours[-len(expected) :], expected)


@pytest.mark.parametrize("head", ["tokens", "sequence"])
@torch.no_grad()
def test_each_row_has_its_own_head(head: str) -> None:
    model, prompts = prompted("bert", head)
    for prompt in prompts.values():
        for parameter in prompt.heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    with softhooks.rows(model, NAMES):
        together = model(**right_padded(ROWS)).logits
    for logits, name, row in zip(together, NAMES, ROWS, strict=True):
        with softhooks.disabled(model) if name is None else softhooks.rows(model, [name]):
            alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits if head == "sequence" else logits[: len(row)], alone, **CLOSE)


@pytest.mark.parametrize("methods", [METHODS, SCALED], ids=["plain", "scaled"])
def test_each_prompt_gets_its_own_rows_gradient(methods: dict[str, LlamaAdapter]) -> None:
    model, prompts = prompted("llama", methods=methods)
    parameters = [parameter for prompt in prompts.values() for parameter in prompt.encoder.parameters()]
    batch = right_padded(ROWS)

    def gradients(kept: list[bool]) -> list[Tensor]:
        with softhooks.rows(model, NAMES):
            logits = model(**batch).logits[batch["attention_mask"].bool() & torch.tensor(kept)[:, None]]
        return list(torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True))

    for name in ("a", "b"):
        found = gradients([own == name for own in NAMES])
        softhooks.activate(model, name)
        alone = torch.cat([model(row[None]).logits[0] for row, own in zip(ROWS, NAMES, strict=True) if own == name])
        mine = list(prompts[name].encoder.parameters())
        expected = dict(zip(map(id, mine), torch.autograd.grad(alone.square().sum(), mine), strict=True))
        for parameter, ours in zip(parameters, found, strict=True):
            theirs = expected.get(id(parameter), torch.zeros_like(parameter))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * max(float(theirs.abs().max()), 1e-6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_under_activation_checkpointing(reentrant: bool) -> None:
    model, prompts = prompted("llama", methods=SCALED)
    model.train()
    parameters = [parameter for prompt in prompts.values() for parameter in prompt.encoder.parameters()]

    def gradients() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with softhooks.rows(model, NAMES):
            model(**right_padded(ROWS)).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in parameters]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_no_row_with_an_adapter_is_the_bare_model() -> None:
    model, _ = prompted("llama", methods=SCALED)
    ids = zoo.text(2, 6)
    with softhooks.disabled(model):
        bare = model(ids).logits
    with softhooks.rows(model, [None, None]):
        assert torch.equal(model(ids).logits, bare)
    with softhooks.rows(model, ["a", None]):
        assert torch.equal(model(ids).logits[1], bare[1])


@pytest.mark.parametrize("other", [PrefixTuning(2), PromptTuning(2), PromptTuning(2, placement="after_first")], ids=str)
def test_another_injection_next_to_an_adapter_is_refused_by_name(other: Any) -> None:
    model, _ = prompted("llama")
    softhooks.attach(model, other, "other")
    with softhooks.rows(model, ["a", "other"]):
        for _ in range(2):
            with pytest.raises(UnsupportedModeError, match=r"cannot share a batch(.|\n)*a: branch, other: \w+"):
                model(zoo.text(2, 5))
    softhooks.activate(model, "a")
    assert bool(model(zoo.text(2, 5)).logits.isfinite().all())


def test_rows_that_a_layer_does_not_keep_apart_are_refused() -> None:
    """OPT gives its linear layers all tokens in one dimension, which cannot be scaled row by row."""
    model, _ = prompted("opt", methods=SCALED)
    with (
        softhooks.rows(model, NAMES),
        pytest.raises(UnsupportedModeError, match=r"fc1 has the shape(.|\n)*one entry per row"),
    ):
        model(**right_padded(ROWS))
    with softhooks.rows(model, ["a"] * 4):
        assert bool(model(**right_padded(ROWS)).logits.isfinite().all())


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_an_adapter_learns_what_the_frozen_model_cannot_do(arch: str) -> None:
    """The task is which of two ids came first; the frozen model with its own head is at chance level."""
    torch.manual_seed(0)
    model = zoo.build(arch, "sequence", num_labels=2)
    generator = torch.Generator().manual_seed(1)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(10, zoo.VOCABULARY, (count, 6), generator=generator)
        labels = torch.randint(2, (count,), generator=generator)
        ids[:, 2], ids[:, 4] = torch.where(labels == 0, 5, 7), torch.where(labels == 0, 7, 5)
        return ids, labels

    tests, answers = batch(256)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(tests).logits.argmax(-1) == answers).float().mean())

    assert accuracy() < 0.65
    with softhooks.attach(model, LlamaAdapter(8), train_head=False) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=3e-2)
        for _ in range(250):
            ids, labels = batch(64)
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert accuracy() > 0.9
        prompt.verify_frozen()
