"""Tiny models of any architecture in transformers' Auto mappings, with every size in the config made small."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.survey.case import Case
from benchmarks.survey.modality import Task, without_dropout
from softhooks.analysis.tiny_config import CHANGES, shrunk, widen

_FULL = {"attention_type": "original_full"}
FULL_ATTENTION = {"big_bird": _FULL, "bigbird_pegasus": _FULL}
"""Attributes of configs with defaults that attach refuses."""


@cache
def _config(arch: str) -> Any:
    config_class = CONFIG_MAPPING[arch]
    return config_class(**shrunk(config_class, **CHANGES.get(arch, {}), **FULL_ATTENTION.get(arch, {})))


def tiny_model(case: Case, task: Task) -> Any:
    """Make a tiny model in evaluation mode, without dropout, whose generation does not end early.

    A model for causal language modeling that can also be an encoder is a decoder.
    """
    config = copy.deepcopy(_config(case.arch))
    if case.task == "causal" and hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    for name, value in case.changes:
        setattr(config, name, value)
    torch.manual_seed(0)
    model = getattr(transformers, task.auto_class).from_config(config).eval()
    widen(model)
    without_dropout(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = pad_id(model)
    return model


def pad_id(model: Any) -> int:
    """The id of padding; 0 if the config has none."""
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0
