"""PEFT models with given prompts, to measure PEFT's own errors; None where PEFT is not installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

HAS_PEFT = importlib.util.find_spec("peft") is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's warnings about arguments that it drops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prompted(model: Any, rows: Tensor, task: str = "CAUSAL_LM", **config: Any) -> Any:
    """PEFT's prompt tuning with these rows, on a model that PEFT may change."""
    import peft

    with quiet():
        wrapped = peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=rows.shape[0], **config)
        )
    with torch.no_grad():
        weight = wrapped.prompt_encoder["default"].embedding.weight
        weight.copy_(rows.detach().repeat(weight.shape[0] // rows.shape[0], 1))
    return wrapped.eval()


def prefixed(model: Any, table: Tensor | None, length: int, task: str = "CAUSAL_LM") -> Any:
    """PEFT's prefix tuning with this table, [P, L * 2 * Hk * D], in PEFT's order, or with one of its own."""
    import peft

    with quiet():
        wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=length))
    if table is not None:
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.copy_(table.detach())
    return wrapped.eval()
