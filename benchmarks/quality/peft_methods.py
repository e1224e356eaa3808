"""PEFT's methods as contestants."""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from benchmarks.quality.cpt import context_types_and_ids
from benchmarks.quality.inputs import DecoderInputs
from benchmarks.quality.setup import VIRTUAL_TOKENS, Prepared, Setup

HEADS = ["classifier", "score"]
"""The names of the new heads of sequence classifiers, for PEFT's `modules_to_save`."""


def with_peft(model: PreTrainedModel, config: peft.PeftConfig) -> Prepared:
    """Train an adapter of PEFT."""
    wrapped = peft.get_peft_model(model, config)
    return Prepared(wrapped, save=lambda directory: wrapped.save_pretrained(directory))


def lora(model: PreTrainedModel, setup: Setup) -> Prepared:
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **setup.options}
    return with_peft(model, peft.LoraConfig(**_task_type(setup), **settings))


def peft_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    config = peft.PromptTuningConfig(
        **_task_type(setup),
        **_peft_options(setup, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": setup.task.instruction}),
        tokenizer_name_or_path=setup.inputs.tokenizer.name_or_path,
    )
    return with_peft(model, config)


def peft_prefix_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix; for language models, it starts as the keys and values of the task's instruction, as softhooks' does."""
    prepared = with_peft(model, peft.PrefixTuningConfig(**_task_type(setup), **_peft_options(setup, {})))
    if not setup.is_encoder:
        text = repeated(setup, setup.task.instruction, VIRTUAL_TOKENS)
        peft.initialize_kv_prefix_from_text(prepared.model, setup.inputs.tokenizer, text=text, use_chat_template=False)
    return prepared


def peft_multitask_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a multitask prompt with one task."""
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": setup.task.instruction,
        "num_tasks": 1,
        "num_ranks": 1,
    }
    config = peft.MultitaskPromptTuningConfig(
        **_task_type(setup),
        **_peft_options(setup, options),
        tokenizer_name_or_path=setup.inputs.tokenizer.name_or_path,
    )
    prepared = with_peft(model, config)
    prepared.model.register_forward_pre_hook(_first_task, with_kwargs=True)
    return prepared


def _first_task(model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Say that all rows are of the first task."""
    return args, {"task_ids": torch.zeros(len(kwargs["input_ids"]), dtype=torch.long), **kwargs}


def peft_cpt(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a context of training rows, with the options of softhooks' CPT."""
    assert isinstance(setup.inputs, DecoderInputs)
    types, ids = context_types_and_ids(setup.inputs, setup.rows)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=setup.options["decay"],
        opt_projection_epsilon=setup.options["epsilon_input"],
        opt_projection_format_epsilon=setup.options["epsilon_format"],
        tokenizer_name_or_path=setup.inputs.tokenizer.name_or_path,
    )
    return with_peft(model, config)


def repeated(setup: Setup, text: str, tokens: int) -> str:
    """Repeat a text until it has as many tokens."""
    words = text
    while len(setup.inputs.tokenizer(words, add_special_tokens=False)["input_ids"]) < tokens:
        words = f"{words} {text}"
    return words


def peft_p_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    options = {  # the shape of softhooks' default encoder
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 2,
        "encoder_hidden_size": model.config.hidden_size // 2,
    }
    return with_peft(model, peft.PromptEncoderConfig(**_task_type(setup), **_peft_options(setup, options)))


def peft_llama_adapter(model: PreTrainedModel, setup: Setup) -> Prepared:
    layers = model.config.num_hidden_layers
    return with_peft(
        model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=VIRTUAL_TOKENS, adapter_layers=layers)
    )


def _peft_options(setup: Setup, own: dict[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": VIRTUAL_TOKENS, **own, **setup.options}


def _task_type(setup: Setup) -> dict[str, Any]:
    """Return PEFT's task type, and the head to train with the adapter."""
    return {"task_type": "SEQ_CLS", "modules_to_save": HEADS} if setup.is_encoder else {"task_type": "CAUSAL_LM"}
