"""LLaMA-Adapter with a context per row of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapters
import naive
import pytest
import torch
import zoo
from adapters import CASES, prompted
from torch.nn import functional
from transformers import TrainingArguments
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, SoftPromptCallback, UnsupportedModeError

K, C = 3, 5
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one vector", "a vector a virtual token"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_context_is_added_to_every_prompt(case: zoo.Case, form: str) -> None:
    model, prompt, call = prompted(case)
    context = torch.randn(3, 32) if form == "one vector" else torch.randn(3, K, 32)
    logits = model(**call, prompt_context=context).logits
    torch.testing.assert_close(logits, adapters.naive(model, prompt, context, **call), **CLOSE)
    plain = model(**call).logits
    torch.testing.assert_close(plain, adapters.naive(model, prompt, **call), **CLOSE)
    assert float((logits - plain).detach().abs().max()) > 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_context_of_another_width_is_projected_by_a_layer_that_trains(case: zoo.Case) -> None:
    model, prompt, call = prompted(case, context_size=C)
    context = torch.randn(3, C)
    logits = model(**call, prompt_context=context).logits
    tables = dict(prompt.encoder.named_parameters())
    widths = {name.split("_")[0] for name in tables}
    assert widths == ({"encoder", "decoder"} if case.head == "seq2seq" else {"text"})
    if widths == {"text"}:
        projected = functional.linear(context, tables["text_context_weight"], tables["text_context_bias"][0])
        torch.testing.assert_close(logits, adapters.naive(model, prompt, projected, **call), **CLOSE)
    logits.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in prompt.encoder.parameters())


@pytest.mark.parametrize("fusion", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_with_different_contexts_do_not_mix(case: zoo.Case, fusion: int) -> None:
    model, _, call = prompted(case, early_fusion=fusion)
    context = torch.randn(3, 32)
    together = model(**call, prompt_context=context).logits
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in call.items()}
        alone = model(**own, prompt_context=context[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)
    wants = context.clone().requires_grad_()
    model(**call, prompt_context=wants).logits[0].square().sum().backward()
    assert bool(wants.grad[0].abs().sum() > 0)
    assert bool((wants.grad[1:] == 0).all())


@pytest.mark.parametrize(
    "more",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}],
    ids=str,
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_generate_takes_a_context_for_each_row(arch: str, more: dict[str, Any]) -> None:
    model = naive.endless(zoo.build(arch)).requires_grad_(False)
    prompt = adapters.stir(softhooks.attach(model, LlamaAdapter(K, gate="raw")), 2.0)
    rows, context = [zoo.text(1, n, seed=n)[0] for n in (7, 4)], 2 * torch.randn(2, 32)
    found = model.generate(**naive.left_padded(rows), prompt_context=context, max_new_tokens=5, do_sample=False, **more)
    expected = []
    for row, own in zip(rows, context, strict=True):

        def step(ids: torch.Tensor, own: torch.Tensor = own) -> torch.Tensor:
            return adapters.naive(model, prompt, own[None], input_ids=ids[None], use_cache=False)[0, -1]

        expected.append(naive.beam(step, row, 3, 5) if "num_beams" in more else naive.greedy(step, row, 5))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[-len(theirs) :], theirs)
    assert not torch.equal(
        found, model.generate(**naive.left_padded(rows), max_new_tokens=5, do_sample=False, **more)
    ), "the context must matter"


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
@torch.no_grad()
def test_generate_brings_the_context_to_an_encoder_too(arch: str) -> None:
    """`generate` calls the encoder itself, past the model's forward."""
    model = naive.endless(zoo.build(arch, "seq2seq")).requires_grad_(False)
    prompt = adapters.stir(softhooks.attach(model, LlamaAdapter(K, gate="raw")), 2.0)
    ids, context, start = zoo.text(2, 7), 2 * torch.randn(2, 32), torch.tensor([model.config.decoder_start_token_id])
    found = model.generate(ids, prompt_context=context, max_new_tokens=5, do_sample=False)
    for row in range(2):

        def step(grown: torch.Tensor, row: int = row) -> torch.Tensor:
            own = {"input_ids": ids[row : row + 1], "decoder_input_ids": grown[None], "use_cache": False}
            return adapters.naive(model, prompt, context[row : row + 1], **own)[0, -1]

        assert torch.equal(found[row], naive.greedy(step, start, 5))
    with softhooks.disabled(model):
        bare = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(ids, prompt_context=context, max_new_tokens=5, do_sample=False), bare)


@torch.no_grad()
def test_a_context_is_computed_once_while_text_is_generated() -> None:
    model = naive.endless(zoo.build("llama"))
    with softhooks.attach(model, LlamaAdapter(K)) as prompt:
        before = prompt.computed
        context, ids = torch.randn(2, 32), zoo.text(2, 5)
        model.generate(ids, prompt_context=context, max_new_tokens=6, do_sample=False)
        assert prompt.computed == before + 1
        adapters.stir(prompt)
        first = model(ids, prompt_context=context).logits
        assert not torch.allclose(model(ids, prompt_context=-context).logits, first, atol=1e-3), "another context"
        context.neg_()
        assert not torch.allclose(model(ids, prompt_context=context).logits, first, atol=1e-3), "changed in place"


def test_a_context_under_activation_checkpointing() -> None:
    """Also if it was computed by a model that is being trained."""
    model, prompt, call = prompted(zoo.Case("llama", "causal"), context_size=C, scale_and_bias=True)
    model.train()
    eye = torch.nn.Linear(4, C)
    leaves = [*prompt.encoder.parameters(), *eye.parameters()]

    def gradients() -> tuple[torch.Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        model(**call, prompt_context=eye(torch.ones(3, 4))).logits.square().mean().backward()
        return tuple(leaf.grad.clone() for leaf in leaves)

    plain = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for ours, theirs in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


WRONG = {
    "another batch": (torch.ones(2, 32), r"length 2 for a batch of 3 rows"),
    "another width": (torch.ones(3, 31), r"one vector(.|\n)*\[3, 31\](.|\n)*\[B, 32\] or \[B, 3, 32\]"),
    "other tokens": (torch.ones(3, 2, 32), r"\[3, 2, 32\]"),
    "four dimensions": (torch.ones(3, 1, 1, 32), r"\[3, 1, 1, 32\]"),
    "one dimension": (torch.ones(3), r"\[3\]"),
    "whole numbers": (torch.ones(3, 32, dtype=torch.long), r"torch\.int64"),
    "no tensor": ([[1.0] * 32] * 3, r"is a list; it must be a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_context_is_refused(name: str) -> None:
    context, message = WRONG[name]
    model, _, call = prompted(zoo.Case("llama", "causal"))
    before = model(**call).logits
    with pytest.raises(UnsupportedModeError, match=message):
        model(**call, prompt_context=context)
    assert torch.equal(model(**call).logits, before)


def test_a_trainer_keeps_the_column(tmp_path: Any) -> None:
    """The label depends on the context alone: if the Trainer dropped it, nothing could be learned."""
    from transformers import Trainer

    model = zoo.build("llama", "sequence").requires_grad_(False)
    eye = torch.eye(3, C)
    data = [
        {
            "input_ids": zoo.text(1, 6)[0],
            "attention_mask": torch.ones(6).long(),
            "prompt_context": eye[n % 3],
            "labels": n % 3,
        }
        for n in range(12)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=5e-2, per_device_train_batch_size=12, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    callback = SoftPromptCallback(LlamaAdapter(K, context_size=C), train_head=False)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    with torch.no_grad():
        logits = model.eval()(zoo.text(1, 6).expand(3, -1), prompt_context=eye).logits
    assert logits.argmax(-1).tolist() == [0, 1, 2]
