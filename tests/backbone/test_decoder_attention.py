"""Gated branches in decoders with inline attention and a cache, against the attention module itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import adapters
import naive
import pytest
import tiny_models as models
import torch
from fixed_cache import added_branches
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedMethodError
from softhooks.runtime.prompted_model import prompted_model_of

K = 3
CASES: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}), ("gptj", {}), ("codegen", {}), ("gpt_neox_japanese", {}), ("mpt", {}), ("trocr", {}), ("xglm", {}),
    ("gpt_neo", {}), ("falcon", {}), ("falcon", {"alibi": True}), ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"_attn_implementation": "eager"}), ("falcon", {"_attn_implementation": "eager", "alibi": True}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def build(arch: str, changes: dict[str, Any]) -> Any:
    return models.build(arch, "causal", **changes).requires_grad_(False)


def batch(side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Two rows of text, the second padded, and a mask of the real tokens."""
    ids = torch.randint(10, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize(("arch", "changes"), CASES, ids=str)
def test_a_branch_adds_what_the_module_computes_for_the_prompt_alone(arch: str, changes: dict[str, Any]) -> None:
    model = build(arch, changes)
    with softhooks.attach(model, LlamaAdapter(K, gate="raw", gate_per="layer")) as prompt:
        (call, real), sites = batch(), prompt.prompted_model.structure.entry.sites
        with softhooks.disabled(model):
            bare = model(**call).logits
        assert torch.equal(model(**call).logits, bare)  # the gates are 0
        adapters.stir(prompt)
        tables = dict(prompt.encoder.named_parameters())
        rows = tables["text_prompts"].view(len(sites), K, -1)
        gates = tables["text_gates"].view(-1, 1)
        takes_positions = prompt.prompted_model.structure.entry.positions.takes_position_ids
        for side in ("right", "left") if takes_positions or arch in ("bloom", "mpt") else ("right",):
            call, real = batch(side)
            if takes_positions:  # the bare model would count padding
                call["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
            logits = model(**call).logits[real]
            with softhooks.disabled(model), added_branches([site.module for site in sites], rows, gates):
                expected = model(**call).logits[real]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
        with softhooks.disabled(model):
            assert float((logits - model(**call).logits[real]).detach().abs().max()) > 0.01
        found = torch.autograd.grad(logits.square().sum(), list(tables.values()))
        for ours, theirs in zip(
            found, torch.autograd.grad(expected.square().sum(), list(tables.values())), strict=True
        ):
            assert bool((ours.flatten(0, -2) != 0).any(0).all())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("arch", ["gptj", "bloom", "falcon", "xglm"])
def test_checkpointed_layers_and_generation(arch: str) -> None:
    model = build(arch, {})
    call, _ = batch("left")
    bare = model(**call).logits
    with softhooks.attach(model, LlamaAdapter(K)) as prompt:
        adapters.stir(prompt)
        gradients = []
        for checkpointed in (False, True):
            model.gradient_checkpointing_enable() if checkpointed else None
            model.train(checkpointed)
            for module in model.modules():
                for name in ("p", "dropout", "activation_dropout", "hidden_dropout", "attn_dropout_p"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
            loss = model(**call).logits.square().mean()
            gradients.append(torch.autograd.grad(loss, list(prompt.encoder.parameters())))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        model.gradient_checkpointing_disable()
        model.eval()
        naive.endless(model)
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
        cached = model.generate(**call, **options)
        assert torch.equal(cached, model.generate(**call, **options, use_cache=False))
    assert torch.equal(model(**call).logits, bare)


def test_unscaled_scores_do_not_overflow_in_half_precision() -> None:
    model = build("gpt_neo", {}).half()
    call, _ = batch()
    with softhooks.attach(model, LlamaAdapter(K, gate="raw")) as prompt:
        adapters.stir(prompt)
        for name, parameter in prompt.encoder.named_parameters():
            if name.endswith("prompts"):
                parameter.data.mul_(2e4)
        assert bool(model(**call).logits.isfinite().all())


@pytest.mark.parametrize("arch", ["gptj", "bloom"])
def test_prefixes_still_enter_through_the_cache(arch: str) -> None:
    model = build(arch, {})
    with softhooks.attach(model, PrefixTuning(K)) as prompt:
        assert prompt.injection == "cache"
    with softhooks.attach(model, PromptTuning(K, init="random")) as prompt:
        assert prompt.injection == "shared"


@pytest.mark.parametrize(
    ("arch", "name", "training"), [("gptj", "_attn", False), ("bloom", "forward", False), ("bloom", "forward", True)]
)
def test_a_module_that_computes_something_else_is_refused(
    arch: str, name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(arch, {})
    kind = next(type(module) for module in model.modules() if type(module).__name__.endswith("Attention"))
    own = getattr(kind, name)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, *rest = own(self, *args, **kwargs)
        return (output * 1.01 if self.training == training else output), *rest

    changed.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, name, changed)
    with pytest.raises(UnsupportedMethodError, match="gated branch"):
        softhooks.attach(model, LlamaAdapter(K))
    assert prompted_model_of(model) is None
