"""Tiny models of any architecture in transformers' Auto mappings, with every size in the config made small."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.survey.tiny import FULL_ATTENTION
from softhooks.analysis.tiny_config import CHANGES, shrunk, widen

TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "image_text": "AutoModelForImageTextToText",
}

_NAMES = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "tokens": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "qa": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image_text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def names(task: str) -> list[str]:
    """Every architecture that transformers has for a task."""
    return list(getattr(modeling_auto, _NAMES[task]))


@cache
def _config(arch: str) -> Any:
    config_class = CONFIG_MAPPING[arch]
    return config_class(**shrunk(config_class, **CHANGES.get(arch, {}), **FULL_ATTENTION.get(arch, {})))


def build(arch: str, task: str, seed: int = 0, **changes: Any) -> Any:
    """Make a tiny model in evaluation mode, with weights large enough that every part of it matters to its output.

    Args:
        arch: the `model_type` of its config.
        task: one of `TASKS`.
        changes: attributes of the config to set.
    """
    config = copy.deepcopy(_config(arch))
    if task == "causal" and hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = getattr(tf, TASKS[task]).from_config(config).eval()
    widen(model)
    return model
