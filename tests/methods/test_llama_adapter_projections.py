"""LLaMA-Adapter in layers whose attention modules get several inputs, make several calls, or attend to two texts at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import tiny_models as models
import torch
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter

K = 3


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def heads(states: Tensor, size: int) -> Tensor:
    """[K, Hk * D] -> [Hk, K, D]"""
    return states.unflatten(-1, (-1, size)).transpose(0, 1)


def ctrl(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    own = model.transformer.h[index].multi_head_attention
    return heads(own.Wk(rows), own.head_dim), heads(own.Wv(rows), own.head_dim)


def mobilebert(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    layer = model.mobilebert.encoder.layer[index]
    own = layer.attention.self
    _, narrow, wide, _ = layer.bottleneck(rows)
    return heads(own.key(narrow), own.attention_head_size), heads(own.value(wide), own.attention_head_size)


def diffllama(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    own = model.model.layers[index // 2].self_attn
    half = heads(own.v_proj(rows), own.head_dim).chunk(2)[index % 2]
    return heads(own.k_proj(rows), own.head_dim), half.repeat(2, 1, 1)


def t5gemma2(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    encoder = model.model.encoder.text_model.layers
    own = (encoder[index] if index < len(encoder) else model.model.decoder.layers[index - len(encoder)]).self_attn
    return own.k_norm(heads(own.k_proj(rows), own.head_dim)), heads(own.v_proj(rows), own.head_dim)


def qwen4(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    own = model.model.layers[1 + index].self_attn  # the first layer has linear attention
    return own.k_norm(heads(own.k_proj(rows), own.head_dim)), heads(own.v_proj(rows), own.head_dim)


@pytest.mark.parametrize(
    ("arch", "task", "project"),
    [
        ("ctrl", "causal", ctrl), ("mobilebert", "masked", mobilebert), ("diffllama", "causal", diffllama),
        ("t5gemma2", "seq2seq", t5gemma2), ("qwen4_exp_text", "causal", qwen4),
    ],
    ids=["ctrl", "mobilebert", "diffllama", "t5gemma2", "qwen4"],
)  # fmt: skip
def test_a_branch_against_the_layers_projections(arch: str, task: str, project: Any) -> None:
    model = models.build(arch, task).requires_grad_(False)
    ids = torch.randint(10, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    call = {"input_ids": ids, **({"decoder_input_ids": ids[:, 2:]} if task == "seq2seq" else {})}
    with softhooks.attach(model, LlamaAdapter(K, gate="raw")) as prompt:
        with softhooks.disabled(model):
            bare = model(**call).logits
        assert torch.equal(model(**call).logits, bare)  # the gates are 0
        adapters.stir(prompt)
        tables = dict(prompt.encoder.named_parameters())
        branches = []
        for stack in prompt.prompted_model.structure.stacks:
            sites = stack.sites_of("self")
            rows = tables[f"{stack.name}_prompts"].view(len(sites), K, -1)
            for own, gates in zip(rows, tables[f"{stack.name}_gates"].view(len(sites), -1), strict=True):
                pair = project(model, len(branches), own)
                wide = [part.repeat_interleave(len(gates) // len(part), 0)[None] for part in pair]
                branches.append((wide[0], wide[1], gates))
        logits = model(**call).logits
        with softhooks.disabled(model), adapters.patched(branches):
            expected = model(**call).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
        assert float((logits - bare).detach().abs().max()) > 0.01
        parameters = list(tables.values())
        for ours, theirs in zip(
            torch.autograd.grad(logits.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            strict=True,
        ):
            assert bool((ours != 0).any(0).all())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_hooks_inside_the_layer_see_only_the_text() -> None:
    model = models.build("mobilebert", "masked", _attn_implementation="eager").requires_grad_(False)
    seen: list[torch.Size] = []
    with softhooks.attach(model, LlamaAdapter(K)) as prompt:
        adapters.stir(prompt)
        inside = model.mobilebert.encoder.layer[0].attention.self
        handle = inside.register_forward_hook(lambda _module, _args, output: seen.append(output[0].shape))
        output = model(input_ids=torch.arange(10, 17)[None], output_attentions=True)
        handle.remove()
    assert seen == [torch.Size([1, 7, inside.all_head_size])]
    assert [part.shape[-2:] for part in output.attentions] == [(7, 7)] * model.config.num_hidden_layers
