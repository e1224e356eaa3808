"""Files of LLaMA-Adapters: softhooks' own, and PEFT's where PEFT computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from untouched import remove_all, same_bits, untouched

import softhooks
from softhooks import CheckpointError, LlamaAdapter, PromptMismatchError
from softhooks.formats.files import read_tensors, write_tensors
from softhooks.formats.softhooks_files import DESCRIPTION, FORMAT, TENSORS

K = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "raw, a layer": {"gate": "raw", "gate_per": "layer", "num_layers": 1},
    "a context": {"context_size": 5},
    "version 2": {"scale_and_bias": True, "early_fusion": 1, "context_size": 5},
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("arch", "head"), [("llama", "causal"), ("bert", "sequence"), ("t5", "seq2seq")])
@torch.no_grad()
def test_every_option_is_saved_and_loaded(tmp_path: Path, arch: str, head: str, name: str) -> None:
    model, case = zoo.build(arch, head), zoo.Case(arch, head)
    method = LlamaAdapter(K, **OPTIONS[name])
    prompt = adapters.stir(softhooks.attach(model, method))
    for parameter in prompt.heads.parameters():
        parameter.add_(torch.randn_like(parameter))
    call = {**zoo.inputs(case, zoo.text(2, 7)), "prompt_context": torch.randn(2, method.context_size or 32)}
    expected = zoo.main_output(model(**call))
    prompt.save_pretrained(tmp_path)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert described["conventions"]["gate"] == method.gate
    for trainable in (False, True):
        fresh = zoo.build(arch, head)
        loaded = softhooks.load(fresh, tmp_path, trainable=trainable)
        assert loaded.method == method
        assert same_bits(zoo.main_output(fresh(**call)), expected)
        numbers = sum(p.numel() for p in prompt.parameters())
        assert sum(p.numel() for p in loaded.parameters()) == (numbers if trainable else 0)
        folded = sum(table.numel() for table in loaded.encoder.folded().values())
        heads = sum(parameter.numel() for parameter in loaded.heads.parameters())
        assert loaded.num_parameters == (numbers if trainable else folded + heads)


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change a file's description and its tensors."""
    tensors, metadata = read_tensors(folder / TENSORS)
    told = json.loads(metadata[FORMAT])
    change(told, tensors)
    told["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / TENSORS, tensors, {FORMAT: json.dumps(told)})


def _less(name: str) -> Callable[[Any, Any], None]:
    return lambda _told, held: held.update({name: held[name][:, 1:].contiguous()})


FALSE: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = {
    "another number of rows": lambda told, held: held.update(
        {"prompt.text_prompts": held["prompt.text_prompts"][1:].clone()}
    ),
    "no rows": lambda told, held: held.update({"prompt.text_prompts": held["prompt.text_prompts"][:0].clone()}),
    "fewer layers": lambda told, held: held.update({"prompt.text_prompts": held["prompt.text_prompts"][K:].clone()}),
    "narrower rows": _less("prompt.text_prompts"),
    "a gate too few": _less("prompt.text_gates"),
    "a factor too few": _less("prompt.text_factors"),
    "a context of another width": _less("prompt.text_context_weight"),
    "no gates": lambda told, held: held.pop("prompt.text_gates"),
    "no offsets": lambda told, held: held.pop("prompt.text_offsets"),
    "another stack": lambda told, held: held.update({"prompt.encoder_gates": held.pop("prompt.text_gates")}),
    "not a number": lambda told, held: held["prompt.text_gates"].fill_(float("nan")),
    "another gate": lambda told, held: told["conventions"].update(gate="sigmoid"),
    "no gate": lambda told, held: told["conventions"].pop("gate"),
    "gates that contradict": lambda told, held: told["conventions"].update(gate="raw"),
    "rotated rows": lambda told, held: told["conventions"].update(rows="rotated"),
    "options that are none": lambda told, held: told["options"].update(num_layers="all"),
    "a number that is a word": lambda told, held: told["options"].update(early_fusion="1"),
    "more layers than there are": lambda told, held: told["options"].update(num_layers=7),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_file_is_refused_and_the_model_is_as_it_was(tmp_path: Path, name: str) -> None:
    with softhooks.attach(zoo.build("llama"), LlamaAdapter(K, context_size=5, scale_and_bias=True)) as prompt:
        prompt.save_pretrained(tmp_path)
    rewritten(tmp_path, FALSE[name])
    target = zoo.build("llama")
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError, softhooks.UnsupportedMethodError)):
        softhooks.load(target, tmp_path)


@pytest.mark.parametrize(
    "other", [("gpt2", {}), ("llama", {"num_hidden_layers": 3}), ("llama", {"num_key_value_heads": 4}), ("bert", {})]
)
def test_a_prompt_of_another_model_is_refused(tmp_path: Path, other: tuple[str, dict[str, Any]]) -> None:
    with softhooks.attach(zoo.build("llama"), LlamaAdapter(K)) as prompt:
        prompt.save_pretrained(tmp_path)
    arch, changes = other
    target = zoo.build(arch, "masked" if arch == "bert" else "causal", **changes)
    with untouched(target), pytest.raises(PromptMismatchError):
        softhooks.load(target, tmp_path)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def written(folder: Path, arch: str, head: str, task: str, layers: int = 2, **changes: Any) -> Any:
    """Make and save an adapter with PEFT, with random values; return its model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.AdaptionPromptConfig(adapter_len=K, adapter_layers=layers, task_type=task)
    model = peft.get_peft_model(zoo.build(arch, head, **changes), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.normal_(std=0.7)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("arch", "layers", "changes"), [
    ("llama", 2, {}), ("llama", 1, {}), ("llama", 2, {"num_key_value_heads": 4}), ("mistral", 2, {}), ("mistral", 1, {}),
])  # fmt: skip
@torch.no_grad()
def test_pefts_adapter_answers_as_in_peft(tmp_path: Path, arch: str, layers: int, changes: dict[str, Any]) -> None:
    ids = zoo.text(3, 9)
    expected = written(tmp_path, arch, "causal", "CAUSAL_LM", layers, **changes)(ids).logits
    model = zoo.build(arch, **changes)
    bare = model(ids).logits
    prompt = softhooks.load(model, tmp_path)
    assert prompt.method == LlamaAdapter(K, num_layers=layers, gate="raw", gate_per="layer")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert float((bare - expected).abs().max()) > 0.05
    prompt.save_pretrained(tmp_path / "ours")
    again = zoo.build(arch, **changes)
    softhooks.load(again, tmp_path / "ours")
    assert same_bits(again(ids).logits, model(ids).logits)


def test_pefts_adapter_trains_on(tmp_path: Path) -> None:
    written(tmp_path, "llama", "causal", "CAUSAL_LM")
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    prompt = softhooks.load(model, tmp_path, trainable=True)
    model(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in prompt.parameters())


def test_pefts_adapter_on_biased_projections_is_refused(tmp_path: Path) -> None:
    """There PEFT adds the projection's bias a second time."""
    written(tmp_path, "llama", "causal", "CAUSAL_LM", attention_bias=True)
    target = zoo.build("llama", attention_bias=True)
    with (
        untouched(target),
        pytest.raises(PromptMismatchError, match=r"have no bias(.|\n)*llama, 2 layers, .* with a bias"),
    ):
        softhooks.load(target, tmp_path)


def test_pefts_adapter_of_gpt2_is_refused(tmp_path: Path) -> None:
    """There PEFT leaves the output projection out."""
    written(tmp_path, "gpt2", "causal", "CAUSAL_LM")
    target = zoo.build("gpt2")
    with (
        untouched(target),
        pytest.raises(CheckpointError, match=r"transformer\.h\.0.* is neither the prompt nor the gate of a Llama"),
    ):
        softhooks.load(target, tmp_path)


@pytest.mark.parametrize(
    ("arch", "changes"), [("qwen3", {}), ("llama", {"num_hidden_layers": 3}), ("llama", {"num_hidden_layers": 1})]
)
def test_pefts_adapter_on_another_model_is_refused(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    written(tmp_path, "llama", "causal", "CAUSAL_LM")
    target = zoo.build(arch, **changes)
    with untouched(target), pytest.raises((PromptMismatchError, softhooks.UnsupportedMethodError)):
        softhooks.load(target, tmp_path)


_PROMPT = "base_model.model.model.layers.{}.self_attn.adaption_prompt"
_GATE = "base_model.model.model.layers.{}.self_attn.adaption_gate"
FALSE_PEFT: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "nothing": lambda held: held.clear(),
    "a gate too few": lambda held: held.pop(_GATE.format(1)),
    "a layer left out": lambda held: [
        held.update({part.format(3): held.pop(part.format(1))}) for part in (_PROMPT, _GATE)
    ],
    "a shorter prompt": lambda held: held.update({_PROMPT.format(1): held[_PROMPT.format(1)][:, 1:].clone()}),
    "two dimensions": lambda held: held.update({_PROMPT.format(i): held[_PROMPT.format(i)][0].clone() for i in (0, 1)}),
    "no rows": lambda held: held.update({_PROMPT.format(i): torch.zeros(1, 0, 32) for i in (0, 1)}),
    "a gate a head": lambda held: held.update({_GATE.format(i): torch.zeros(4) for i in (0, 1)}),
    "narrower rows": lambda held: held.update({_PROMPT.format(i): torch.zeros(1, K, 31) for i in (0, 1)}),
    "a head": lambda held: held.update({"base_model.model.score.weight": torch.zeros(3, 32)}),
    "a foreign tensor": lambda held: held.update({"lora_A.weight": torch.zeros(2)}),
    "whole numbers": lambda held: held.update({_GATE.format(0): torch.zeros(1).long()}),
    "not a number": lambda held: held[_GATE.format(0)].fill_(float("nan")),
    "a number of a million digits": lambda held: held.update({_GATE.format("9" * 1000): torch.zeros(1)}),
}


@pytest.mark.parametrize("name", FALSE_PEFT)
def test_false_tensors_of_peft_are_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, "llama", "causal", "CAUSAL_LM")
    held = load_file(tmp_path / "adapter_model.safetensors")
    FALSE_PEFT[name](held)
    save_file(held, tmp_path / "adapter_model.safetensors")
    target = zoo.build("llama")
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError)):
        softhooks.load(target, tmp_path)


# --- written for PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["raw", "tanh"])
@pytest.mark.parametrize(("arch", "layers"), [("llama", None), ("llama", 1), ("mistral", None)])
@torch.no_grad()
def test_what_is_written_for_peft_answers_in_peft_and_is_read_back(
    tmp_path: Path, arch: str, layers: int | None, gate: str
) -> None:
    peft = pytest.importorskip("peft")
    ids = zoo.text(3, 9)
    model = zoo.build(arch)
    bare = model(ids).logits
    with adapters.stir(
        softhooks.attach(model, LlamaAdapter(K, num_layers=layers, gate=gate, gate_per="layer"))
    ) as prompt:
        expected = model(ids).logits
        prompt.save_pretrained(tmp_path, as_peft=True)
    theirs = peft.PeftModel.from_pretrained(zoo.build(arch), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=2e-5)
    assert float((bare - expected).abs().max()) > 0.05
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)


NOT_WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "gates that differ": ("llama", {}, {}, "differ between the heads"),
    "a context": ("llama", {"context_size": 5}, {}, "context"),
    "version 2": ("llama", {"scale_and_bias": True}, {}, "factors"),
    "biased projections": ("llama", {"gate_per": "layer"}, {"attention_bias": True}, "with a bias"),
    "another model": ("qwen3", {"gate_per": "layer"}, {}, "qwen3"),
    "GPT-2": ("gpt2", {"gate_per": "layer"}, {}, "gpt2"),
}


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_peft_would_compute_otherwise_is_not_written(tmp_path: Path, name: str) -> None:
    arch, options, changes, words = NOT_WRITTEN[name]
    prompt = adapters.stir(softhooks.attach(zoo.build(arch, **changes), LlamaAdapter(K, **options)))
    with prompt, pytest.raises(softhooks.UnsupportedMethodError, match=words):
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_a_head_is_not_written_for_peft(tmp_path: Path) -> None:
    """PEFT saves no head with it."""
    prompt = softhooks.attach(zoo.build("llama", "sequence"), LlamaAdapter(K, gate_per="layer"))
    with prompt, pytest.raises(softhooks.UnsupportedMethodError, match="head"):
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert not list(tmp_path.iterdir())
