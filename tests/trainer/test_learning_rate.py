"""The warning of a learning rate that hardly changes a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from transformers import TrainerState, TrainingArguments

from softhooks import PrefixTuning, PromptTuning
from softhooks.trainer.prompt_checks import warn_about_learning_rate


@pytest.mark.parametrize(
    ("options", "optimizer_lr", "method", "warns"),
    [
        ({"learning_rate": 5e-5}, None, PromptTuning(3), True),
        ({"learning_rate": 5e-5, "warmup_steps": 2}, None, PromptTuning(3), True),
        ({"learning_rate": 1e-2}, None, PromptTuning(3), False),
        ({"learning_rate": 5e-5}, 1e-2, PromptTuning(3), False),
        ({"learning_rate": 5e-5}, None, PrefixTuning(3, projection=True), False),
    ],
)
def test_the_default_learning_rate_gives_a_warning(
    options: dict[str, Any],
    optimizer_lr: float | None,
    method: Any,
    warns: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = zoo.build("llama")
    given = {}
    if optimizer_lr is not None:
        given["optimizers"] = (torch.optim.AdamW(model.parameters(), lr=optimizer_lr), None)
    trainer, _ = training.prompted(tmp_path, model, "causal", method, given=given, **{**options, "max_steps": 1})
    trainer.train()
    messages = [
        record.getMessage() for record in caplog.records if "hardly changes a soft prompt" in record.getMessage()
    ]
    assert len(messages) == warns
    assert not warns or messages[0].startswith("learning_rate=5e-05, the default of TrainingArguments")


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_process_warns(is_first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=args.learning_rate)
    warn_about_learning_rate(args, TrainerState(is_world_process_zero=is_first), optimizer, PromptTuning(3))
    assert ("hardly changes a soft prompt" in caplog.text) == is_first
