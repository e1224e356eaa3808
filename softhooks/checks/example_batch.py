"""Check during `attach` that the model, with the prompt, runs on the user's example batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softhooks.backbone.example import LABELS
from softhooks.backbone.probing import eval_mode, probing_with_prompt
from softhooks.compat.offload import device_of
from softhooks.prompt import SoftPrompt


def check_example(prompt: SoftPrompt, batch: Mapping[str, Any]) -> None:
    """Run the model once on a batch, without gradients; a batch that the prompt does not support is refused here."""
    device = device_of(prompt.structure.entry.embedding)
    accepted = inspect.signature(prompt.model.forward).parameters
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in accepted or name not in LABELS  # a Trainer removes labels that the model does not take
    }
    with probing_with_prompt(prompt.model), eval_mode(prompt.model), prompt.without_objective():
        prompt.model(**inputs)
