"""LLaMA-Adapter version 2: factors, offsets, early fusion, norms."""

from __future__ import annotations

from collections.abc import Iterator

import adapters
import pytest
import torch
import zoo
from adapters import CASES, prompted
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter

K, C = 3, 5
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case.head != "seq2seq"], ids=str)
def test_an_early_context_enters_the_first_layers_alone(case: zoo.Case, tokens: int) -> None:
    model, prompt, call = prompted(case, early_fusion=1, gate="raw")
    context = torch.randn(3, tokens, 32)
    logits = model(**call, prompt_context=context).logits
    torch.testing.assert_close(logits, adapters.naive(model, prompt, context, **call), **CLOSE)
    torch.testing.assert_close(model(**call).logits, adapters.naive(model, prompt, **call), **CLOSE)


def test_prompts_and_an_early_context_are_in_different_layers() -> None:
    model, prompt, call = prompted(zoo.Case("gemma3", "causal"), early_fusion=1, num_layers=1)
    with softhooks.disabled(model):
        bare = model(**call, output_hidden_states=True).hidden_states
    states = model(**call, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(states, bare, strict=True)] == [True, True, True, False]
    assert prompt.encoder.text_prompts.shape == (K, 32)
    with torch.no_grad():
        prompt.encoder.text_gates[0, 4:] = 0  # of the layer that gets the prompts
    fused = model(**call, prompt_context=torch.randn(3, 2, 32), output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(fused, bare, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_and_offsets_are_on_every_linear_layer_of_the_blocks(case: zoo.Case) -> None:
    """The same values, written into a copy's weights, give the same logits."""
    from transformers.pytorch_utils import Conv1D

    model, prompt, call = prompted(case, scale_and_bias=True)
    bare = zoo.build(case.arch, case.head).requires_grad_(False)
    tables = {name: table.detach()[0] for name, table in prompt.encoder.named_parameters() if "prompts" not in name}
    used = dict.fromkeys(("text", "encoder", "decoder"), 0)
    blocks = (".layers.", ".layer.", ".h.", ".block.")
    with torch.no_grad():
        for name, module in bare.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)) and any(block in name for block in blocks):
                stack = "text" if case.head != "seq2seq" else "decoder" if "decoder" in name else "encoder"
                size = module.nf if isinstance(module, Conv1D) else module.out_features
                factor, offset = (
                    tables[f"{stack}_{kind}"][used[stack] : used[stack] + size] for kind in ("factors", "offsets")
                )
                used[stack] += size
                module.weight.mul_(1 + factor if isinstance(module, Conv1D) else 1 + factor[:, None])
                bias = offset if module.bias is None else module.bias * (1 + factor) + offset
                module.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert all(used[name.split("_")[0]] == table.numel() for name, table in tables.items() if "factors" in name)
    found = adapters.branches(bare, dict(prompt.encoder.named_parameters()), prompt.method)
    with adapters.patched(found), torch.no_grad():
        expected = bare(**call).logits
    torch.testing.assert_close(model(**call).logits, expected, rtol=1e-3, atol=1e-4)


def test_factors_go_with_the_prompt() -> None:
    model = zoo.build("llama").requires_grad_(False)
    ids = zoo.text(2, 6)
    bare = model(ids).logits
    first = adapters.stir(softhooks.attach(model, LlamaAdapter(K, scale_and_bias=True), "scaled"))
    scaled = model(ids).logits
    second = softhooks.attach(model, LlamaAdapter(K), "plain")
    assert torch.equal(model(ids).logits, bare)
    softhooks.activate(model, "scaled")
    assert torch.equal(model(ids).logits, scaled)
    second.remove()
    first.remove()
    assert torch.equal(model(ids).logits, bare)
    assert all(not module._forward_hooks for module in model.modules())


def test_weight_decay_pulls_factors_to_one() -> None:
    model = zoo.build("llama").requires_grad_(False)
    with softhooks.attach(model, LlamaAdapter(K, scale_and_bias=True)) as prompt:
        adapters.stir(prompt)
        optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0, weight_decay=1.0)
        for parameter in prompt.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        ids = zoo.text(1, 5)
        logits = model(ids).logits
        with softhooks.disabled(model):
            assert torch.equal(logits, model(ids).logits)


def test_norms_are_trained_with_the_prompt() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, LlamaAdapter(K, scale_and_bias=True), trainable="*norm*") as prompt:
        adapters.stir(prompt)
        model(zoo.text(2, 6)).logits.square().sum().backward()
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        assert len(norms) == 5
        assert all(bool(p.grad.abs().sum() > 0) for p in norms)
        prompt.verify_frozen()


def test_disjoint_groups_train_on_images_and_on_text() -> None:
    """As documented: texts do not change what images train, and vice versa, including Adam's momentum."""
    model = zoo.build("llama").requires_grad_(False)
    method = LlamaAdapter(K, num_layers=1, early_fusion=1, context_size=C, scale_and_bias=True)
    prompt = adapters.stir(softhooks.attach(model, method, trainable="*norm*"))
    early = method.early_fusion * model.config.num_attention_heads
    everything = dict(prompt.named_parameters())
    own = {name.rpartition(".")[2]: parameter for name, parameter in prompt.encoder.named_parameters()}
    gates, seeing = own["text_gates"], [own["text_context_weight"], own["text_context_bias"]]
    rest = [p for p in everything.values() if all(p is not other for other in (gates, *seeing))]

    def adam(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": parameters}, {"params": [gates], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    optimizers, parts = {True: adam(seeing), False: adam(rest)}, {True: seeing, False: rest}
    ids = zoo.text(2, 7)
    for images in (True, False, True, False):
        before = {name: parameter.detach().clone() for name, parameter in everything.items()}
        given = {"prompt_context": torch.randn(2, C)} if images else {}
        model(ids, labels=ids, **given).loss.backward()
        if images:
            gates.grad[:, early:] = 0
        optimizers[images].step()
        model.zero_grad()
        moved = {name: parameter.detach() != before[name] for name, parameter in everything.items()}
        mine = [name for name, parameter in everything.items() if any(parameter is one for one in parts[images])]
        assert {name for name, change in moved.items() if bool(change.any()) and "gates" not in name} == set(mine)
        (changed,) = (change[0] for name, change in moved.items() if "gates" in name)
        assert changed.tolist() == [images] * early + [not images] * (len(changed) - early)


def test_lora_on_the_projections_is_part_of_keys_and_values() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        zoo.build("llama"), peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    )
    ids = zoo.text(2, 6)
    with softhooks.attach(model, LlamaAdapter(K, scale_and_bias=True), trainable="*lora_*") as prompt:
        adapters.stir(prompt)
        with torch.no_grad():
            for name in ("text_factors", "text_offsets"):
                prompt.encoder.get_parameter(name).zero_()
        tables = dict(prompt.encoder.named_parameters())
        with (
            softhooks.disabled(model),
            adapters.patched(adapters.branches(model.get_base_model(), tables, prompt.method)),
        ):
            expected = model(ids).logits
        logits = model(ids).logits
        torch.testing.assert_close(logits, expected, **CLOSE)
        logits.square().sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)
