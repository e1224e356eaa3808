"""Prompts written for PEFT give softhooks' logits in PEFT, and can be loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import zoo

import softhooks
from softhooks import (
    Cartridge,
    ContextTuning,
    Layout,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
    UnsupportedMethodError,
)
from softhooks.method import Method

pytestmark = pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
P = 4

METHODS: dict[str, Callable[[], Method]] = {
    "prompt": lambda: PromptTuning(P),
    "p-tuning": lambda: PTuning(P),
    "prefix": lambda: PrefixTuning(P),
    "P-tuning v2": lambda: PTuningV2(P),
    "prefix with its MLP": lambda: PrefixTuning(P, projection=True, hidden_size=8),
    "context": lambda: ContextTuning(demonstrations=[[5, 6], [7, 8]]),
    "cartridge": lambda: Cartridge(P, document=range(5, 15), frozen_slots=2, distill=False),
    "residual": lambda: ResidualPromptTuning(P, hidden_size=8),
}


def loaded_by_peft(case: zoo.Case, folder: Path) -> Any:
    import peft

    with peers.quiet():
        return peft.PeftModel.from_pretrained(zoo.build(case.arch, case.head), str(folder)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", [zoo.Case(arch, "causal") for arch in ("llama", "gpt2", "qwen3", "mixtral", "opt")], ids=str
)
def test_peft_gives_the_same_logits(tmp_path: Path, case: zoo.Case, method: str) -> None:
    model, ids = zoo.build(case.arch), zoo.text(2, 7)
    with softhooks.attach(model, METHODS[method]()) as prompt, torch.no_grad():
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(ids).logits
    with torch.no_grad(), peers.quiet():
        logits = loaded_by_peft(case, tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits[:, -ids.shape[1] :], expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_classifiers_head_goes_along(tmp_path: Path, arch: str, method: str) -> None:
    case = zoo.Case(arch, "sequence")
    model, ids = zoo.build(arch, "sequence"), zoo.text(2, 7)
    with softhooks.attach(model, METHODS[method]()) as prompt, torch.no_grad():
        for parameter in prompt.heads.parameters():
            parameter.add_(torch.randn_like(parameter))
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(ids).logits
    with torch.no_grad(), peers.quiet():
        logits = loaded_by_peft(case, tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_a_prompt_of_an_encoder_decoder(tmp_path: Path, arch: str) -> None:
    case = zoo.Case(arch, "seq2seq")
    model, ids, decoder_ids = zoo.build(arch, "seq2seq"), zoo.text(2, 7), zoo.text(2, 4, seed=3)
    with softhooks.attach(model, PromptTuning(P)) as prompt, torch.no_grad():
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids}
    with torch.no_grad(), peers.quiet():
        logits = loaded_by_peft(case, tmp_path)(**call).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


ENCODERS: dict[str, tuple[str, str, Callable[[], Method]]] = {
    f"{arch} {head} {kind}": (arch, head, make)
    for arch in zoo.ENCODERS
    for head, kind, make in (
        ("tokens", "prompt", lambda: PromptTuning(P)),
        ("tokens", "p-tuning", lambda: PTuning(P)),
        ("tokens", "prefix", lambda: PrefixTuning(P, shift_positions=True)),
        ("sequence", "prefix", lambda: PrefixTuning(P, shift_positions=True)),
        ("sequence", "P-tuning v2", lambda: PTuningV2(P, shift_positions=True)),
    )
}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_prompts_of_encoders(tmp_path: Path, name: str) -> None:
    """Token classification does not pool; pooled prefixes need text positions that start after them, as in PEFT."""
    arch, head, make = ENCODERS[name]
    case, model, ids = zoo.Case(arch, head), zoo.build(arch, head), zoo.text(2, 7)
    bare = model(ids).logits
    with softhooks.attach(model, make()) as prompt:
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(ids).logits
    with peers.quiet():
        logits = loaded_by_peft(case, tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits[:, -ids.shape[1] :] if head == "tokens" else logits, expected, **CLOSE)
    assert float((expected - bare).abs().max()) > 0.05
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_a_prompt_of_an_encoder_decoder_is_read_back(tmp_path: Path, arch: str) -> None:
    model, case = zoo.build(arch, "seq2seq"), zoo.Case(arch, "seq2seq")
    call = zoo.inputs(case, zoo.text(2, 7))
    with softhooks.attach(model, PromptTuning(P)) as prompt, torch.no_grad():
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(**call).logits
    softhooks.load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**call).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_written_for_peft_is_read_back(tmp_path: Path, method: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 7)
    with softhooks.attach(model, METHODS[method]()) as prompt, torch.no_grad():
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(ids).logits
    softhooks.load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


REFUSED: list[tuple[str, zoo.Case, Callable[[], Method], str]] = [
    ("another place", zoo.Case("llama", "causal"), lambda: PromptTuning(P, placement="after_first"), "after_first"),
    (
        "a layout",
        zoo.Case("llama", "causal"),
        lambda: PTuning(layout=Layout.insert(start=P, after={5: 1}, missing="skip")),
        "layout",
    ),
    ("a template", zoo.Case("llama", "causal"), lambda: PTuning(layout=Layout("{soft:3} {a} {soft:1} {b}")), "layout"),
    ("an encoder", zoo.Case("bert", "sequence"), lambda: PromptTuning(P), "encoder"),
    ("a prefix in an encoder", zoo.Case("bert", "tokens"), lambda: PrefixTuning(P), "encoder"),
    (
        "a prefix in an encoder that takes no cache",
        zoo.Case("albert", "tokens"),
        lambda: PrefixTuning(P, shift_positions=True),
        "Albert",
    ),
    ("three prefixes", zoo.Case("t5", "seq2seq"), lambda: PrefixTuning(P), "encoder"),
    (
        "positions that stay",
        zoo.Case("gpt2", "causal"),
        lambda: PrefixTuning(P, shift_positions=False),
        "shift_positions",
    ),
    ("some layers", zoo.Case("llama", "causal"), lambda: PTuningV2(P, layers=[1]), "every layer"),
    ("no windows", zoo.Case("mistral", "causal"), lambda: PrefixTuning(P, windowed=False), "windowed"),
    ("questions", zoo.Case("llama", "qa"), lambda: PromptTuning(P), "QuestionAnswering"),
]


@pytest.mark.parametrize(("case", "make", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path, case: zoo.Case, make: Any, words: str) -> None:
    prompt = softhooks.attach(zoo.build(case.arch, case.head), make())
    with prompt, pytest.raises(UnsupportedMethodError, match=words):
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert not list(tmp_path.iterdir())


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(P)) as prompt:
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
