"""Shared by the Trainer tests: some methods, options that save, and a callback that records what was trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuningV2, ResidualPromptTuning

METHODS = {
    "prompt": PromptTuning(4),
    "prefix": PrefixTuning(4),
    "prefix-mlp": PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1),
    "p-tuning-v2": PTuningV2(4, layers=[-1], projection=True, hidden_size=16),
    "residual": ResidualPromptTuning(4, hidden_size=16),
    "adapter": LlamaAdapter(4),
}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


class Keeper(tf.TrainerCallback):
    """Keep what was trained and the optimizer's state at every save."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Any, Any]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept[state.global_step] = keep(kwargs["model"], kwargs["optimizer"])


def keep(model: torch.nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Copies of everything that trains."""
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    state = optimizer.state_dict()
    return trained, {
        key: {k: torch.as_tensor(v).clone() for k, v in item.items()} for key, item in state["state"].items()
    }
