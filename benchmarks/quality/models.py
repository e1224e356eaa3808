"""The models: MiniLM, an encoder that gets a new head, and SmolLM2-135M-Instruct, whose next token is the answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from transformers import PreTrainedModel

from softhooks.demo.models import Checkpoint, minilm
from softhooks.demo.smollm2 import smollm2

MINILM, SMOLLM2 = "minilm", "smollm2"

CHECKPOINTS: dict[str, Callable[[], Checkpoint]] = {
    MINILM: minilm,
    SMOLLM2: lambda: smollm2(Console(stderr=True)),
}
SHORT_NAMES = {MINILM: "MiniLM", SMOLLM2: "SmolLM2"}
DESCRIPTIONS = {
    MINILM: "all-MiniLM-L6-v2, an encoder of six layers, with a new head for the classes",
    SMOLLM2: "SmolLM2-135M-Instruct, a language model. Its 4-bit weights (Q4_1) are dequantized, so its scores are not those of "
    "the Hub's weights",
}
ENCODERS = frozenset({MINILM})
PRECISIONS = {MINILM: torch.float32, SMOLLM2: torch.bfloat16}
"""The precision of the frozen weights; what is trained is in float32."""


def checkpoint(name: str) -> Checkpoint:
    """Return the checkpoint of a model."""
    return CHECKPOINTS[name]()


def language_model(name: str) -> PreTrainedModel:
    """Load a language model in its precision."""
    return checkpoint(name).language_model().to(PRECISIONS[name])


def is_encoder(name: str) -> bool:
    """Return whether the model classifies with a new head; the others answer with their next tokens."""
    return name in ENCODERS
