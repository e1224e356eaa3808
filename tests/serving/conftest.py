"""Two saved prompts of the tiny Llama, and a store that has both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

import softhooks
from softhooks import PrefixTuning, PromptStore, PromptTuning

IDS = torch.arange(5, 13)[None]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Two saved prompts, and the logits of the model with each for `IDS`."""
    logits = {}
    for name, method in {"en": PromptTuning(4), "de": PrefixTuning(3)}.items():
        torch.manual_seed(len(logits))
        model = zoo.build("llama")
        with softhooks.attach(model, method) as prompt:
            with torch.no_grad():
                for parameter in prompt.encoder.parameters():
                    parameter.add_(torch.randn_like(parameter))
            logits[name] = model(IDS).logits
            prompt.save_pretrained(tmp_path / name)
    return logits


@pytest.fixture
def store(tmp_path: Path, saved: dict[str, torch.Tensor]) -> PromptStore:
    made = PromptStore(tmp_path / "store")
    assert made.names() == []
    made.add(tmp_path / "en", "en", tags=["production", "v2"])
    made.add(tmp_path / "de", "de")
    return made
