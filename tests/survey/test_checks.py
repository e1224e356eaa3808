"""Every check of the survey holds on Llama, and fails where a prompt does what it must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import StaticCache

import softhooks
from benchmarks.survey.case import Case
from benchmarks.survey.checks import CHECKS
from benchmarks.survey.examine import examine
from benchmarks.survey.modalities import MODALITY_OF, text
from softhooks.runtime.with_blocks import _blocks

LLAMA = Case("causal", "llama")
Damage = Callable[[Any, dict[str, Any], Any], None]


@dataclass(frozen=True)
class Damaged(text.TextModality):
    """A modality in which a prompted model's output is changed."""

    damage: Damage | None = None

    def attach(self, model: Any, method: Any, example: Any) -> softhooks.SoftPrompt:
        prompt = softhooks.attach(model, method)

        def change(_: Any, args: Any, call: dict[str, Any], output: Any) -> None:
            is_on = prompt.is_attached and not any(block.off for block in _blocks.get())
            if is_on and self.damage:
                self.damage(model, call, output)

        model.register_forward_hook(change, with_kwargs=True)
        return prompt


def _as_bare(model: Any, call: dict[str, Any], output: Any) -> None:
    with softhooks.disabled(model):
        output.logits = model(**call).logits


def _wider(model: Any, call: dict[str, Any], output: Any) -> None:
    output.logits = torch.cat([output.logits, output.logits[..., :1]], dim=-1)


def _to_base(model: Any, call: dict[str, Any], output: Any) -> None:
    weight = model.get_input_embeddings().weight.requires_grad_()
    output.logits = output.logits + 0 * weight.sum()


def _by_row(model: Any, call: dict[str, Any], output: Any) -> None:
    output.logits = output.logits + torch.arange(len(output.logits))[:, None, None]


def _by_columns(model: Any, call: dict[str, Any], output: Any) -> None:
    output.logits = output.logits + call["attention_mask"].shape[1]


def _backward(model: Any, call: dict[str, Any], output: Any) -> None:
    output.logits = output.logits + output.logits[:, -1:].mean()


def _louder(model: Any, call: dict[str, Any], output: Any) -> None:
    output.logits = 1.1 * output.logits


def _checkpointed(model: Any, call: dict[str, Any], output: Any) -> None:
    if model.is_gradient_checkpointing:
        output.logits = 1.1 * output.logits


def _cached(model: Any, call: dict[str, Any], output: Any) -> None:
    if call.get("past_key_values") is not None:
        output.logits = output.logits.roll(1, -1)


def _static(model: Any, call: dict[str, Any], output: Any) -> None:
    if isinstance(call.get("past_key_values"), StaticCache):
        output.logits = output.logits.roll(1, -1)


DAMAGE: dict[str, tuple[str, Damage]] = {
    "closed gates": ("adapter", _louder),
    "effect": ("prefix", _as_bare),
    "shapes": ("prompt", _wider),
    "gradients": ("prefix", _to_base),
    "row order": ("adapter", _by_row),
    "padding": ("prompt", _by_columns),
    "causality": ("prefix", _backward),
    "checkpointing": ("prompt", _checkpointed),
    "rows by hand": ("anchors", _louder),
    "cache": ("prefix", _cached),
    "generation": ("slots", _cached),
    "static cache": ("prefix", _static),
    "removal": ("prompt", lambda *_: None),  # the hook stays
}


def test_llama_passes_every_check_with_every_kind_of_prompt() -> None:
    rows = examine(LLAMA)
    assert {kind: row.verdict for kind, row in rows.items()} == dict.fromkeys(text.TEXT.kinds, "right")
    for kind, row in rows.items():
        expected = {name for name, check in CHECKS.items() if not check.kinds or kind in check.kinds}
        assert set(row.checked) | set(row.unsupported) == expected


@pytest.mark.parametrize("check", DAMAGE)
def test_a_check_fails_where_it_must(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, damage = DAMAGE[check]
    damaged = Damaged(text.TEXT.tasks, text.TEXT.checks, text.TEXT.kinds, damage)
    monkeypatch.setitem(MODALITY_OF, "causal", damaged)
    assert check in examine(LLAMA, [kind])[kind].wrong


def test_every_check_but_that_of_real_words_is_tried() -> None:
    assert set(CHECKS) - set(DAMAGE) == {"real words"}  # `tests/test_real_words.py` shows that these comparisons fail
