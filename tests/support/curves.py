"""Check that a tracker has every training log of the Trainer's history; and methods that log more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training
import transformers as tf
import zoo

from softhooks import ContextAwarePromptTuning, LlamaAdapter, PrefixTuning, PromptTuning, SoftPromptCallback
from softhooks.method import Method

BASIC = {"norm", "grad_norm", "distance"}
METHODS: dict[str, tuple[Method, set[str]]] = {
    "prompt": (PromptTuning(4), BASIC),
    "prefix": (PrefixTuning(4), BASIC),
    "adapter": (LlamaAdapter(3), BASIC | {"gate", "gate_max"}),
    "context": (
        ContextAwarePromptTuning(context_ids=[5, 6, 7, 8, 4, 9, 10, 11, 12], token_types=[1, 2, 3, 4, 0, 5, 6, 7, 8]),
        BASIC | {"projected"},
    ),
}
"""Methods, and the values that each of them logs."""


def train(
    folder: Path, method: Method, *more: tf.TrainerCallback, model: Any = None, **options: Any
) -> tuple[tf.Trainer, SoftPromptCallback]:
    """Train on a tiny model."""
    built = zoo.build("llama") if model is None else model
    trainer, callback = training.prompted(folder, built, "causal", method, *more, **options)
    trainer.train()
    return trainer, callback


def expected(trainer: tf.Trainer, names: set[str], prefix: str = "") -> dict[str, dict[int, float]]:
    """The points of each curve by step, from the Trainer's own history."""
    keys = {f"soft_prompt/{name}" for name in names} | {"loss", "grad_norm"}
    found = {f"{prefix}{key}": {log["step"]: log[key] for log in training.logs(trainer)} for key in keys}
    assert all(len(points) == 4 for points in found.values())
    return found


def require_equal(curves: dict[str, dict[int, float]], wanted: dict[str, dict[int, float]]) -> None:
    """Fail if an expected curve differs, up to the precision of a tracker's fp32."""
    for name, points in wanted.items():
        assert curves[name] == pytest.approx(points, rel=1e-6), name
    shown = {name for name in curves if "soft_prompt/" in name}
    assert shown == {name for name in wanted if "soft_prompt/" in name}
