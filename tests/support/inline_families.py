"""Tiny models of the families that compute attention inline, with the weights of the survey's models."""

from __future__ import annotations

from typing import Any

import tiny_models as models
import torch
import zoo
from torch import Tensor

from softhooks.backbone.inline.rewritten_forward import family_of

P, T = 4, 12
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FAMILIES: dict[str, str] = {
    "big_bird": "masked",
    "bigbird_pegasus": "seq2seq",
    "convbert": "masked",
    "flaubert": "masked",
    "layoutlmv3": "tokens",
    "lilt": "tokens",
    "luke": "masked",
    "mvp": "seq2seq",
    "openai-gpt": "causal",
    "squeezebert": "masked",
    "tapas": "masked",
    "xlm": "masked",
}
"""The task of each architecture's head."""


def build(arch: str, **changes: Any) -> Any:
    return models.build(arch, FAMILIES[arch], **changes)


def text(arch: str) -> dict[str, Tensor]:
    call = {"input_ids": zoo.text(2, T)}
    return {**call, "decoder_input_ids": zoo.text(2, 5, seed=1)} if FAMILIES[arch] == "seq2seq" else call


def loud(prompt: Any) -> None:
    prompt.encoder.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.normal_(std=0.5)


def inline_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if family_of(module) is not None]
