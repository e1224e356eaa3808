"""The contestants: softhooks' methods, PEFT's versions of them, LoRA, the head alone, and full fine-tuning."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.quality.peft_methods import (
    lora,
    peft_cpt,
    peft_llama_adapter,
    peft_multitask_prompt_tuning,
    peft_p_tuning,
    peft_prefix_tuning,
    peft_prompt_tuning,
)
from benchmarks.quality.setup import Contestant, Prepared, Setup
from benchmarks.quality.softhooks_methods import (
    cartridge,
    context_tuning,
    cpt,
    llama_adapter,
    llama_adapter_v2,
    long_prefix_tuning,
    long_scaled_prefix_tuning,
    multitask_prompt_tuning,
    p_tuning,
    p_tuning_v2,
    prefix_tuning,
    prompt_tuning,
    residual_prompt_tuning,
    scaled_prefix_tuning,
)
from benchmarks.quality.variants import normalized_prompt_tuning, superposed_prompt_tuning


def head(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Train the new head alone."""
    model.base_model.requires_grad_(False)
    return Prepared(model)


def full(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Train all weights."""
    return Prepared(model)


LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""All learning rates. Each contestant starts with three neighbors; if the best is at an end, the next one is tried too."""

FULL_RATES, LOW, MIDDLE, HIGH, PROMPT = LADDER[1:4], LADDER[3:6], LADDER[4:7], LADDER[5:8], LADDER[6:9]
SOFTHOOKS, PEFT, TRANSFORMERS, VARIANT = "softhooks", "PEFT", "transformers", "variant"

_ALL = (
    Contestant("head", "head only", TRANSFORMERS, HIGH, None, head),
    Contestant("full", "full fine-tuning", TRANSFORMERS, FULL_RATES, None, full),
    Contestant("lora", "LoRA, r = 8", PEFT, MIDDLE, LOW, lora),
    Contestant("prompt_tuning", "prompt tuning", SOFTHOOKS, PROMPT, PROMPT, prompt_tuning),
    Contestant("peft_prompt_tuning", "prompt tuning", PEFT, PROMPT, PROMPT, peft_prompt_tuning, "prompt_tuning"),
    Contestant("prefix_tuning", "prefix tuning", SOFTHOOKS, HIGH, HIGH, prefix_tuning),
    Contestant("peft_prefix_tuning", "prefix tuning", PEFT, HIGH, HIGH, peft_prefix_tuning, "prefix_tuning"),
    Contestant("long_prefix_tuning", "prefix tuning, 60 tokens", SOFTHOOKS, None, HIGH, long_prefix_tuning),
    Contestant("scaled_prefix_tuning", "prefix tuning, scaled", SOFTHOOKS, None, HIGH, scaled_prefix_tuning),
    Contestant(
        "long_scaled_prefix_tuning",
        "prefix tuning, 60 tokens, scaled",
        SOFTHOOKS,
        None,
        PROMPT,
        long_scaled_prefix_tuning,
    ),
    Contestant("p_tuning", "P-tuning", SOFTHOOKS, MIDDLE, MIDDLE, p_tuning),
    Contestant("peft_p_tuning", "P-tuning", PEFT, MIDDLE, MIDDLE, peft_p_tuning, "p_tuning"),
    Contestant("p_tuning_v2", "P-tuning v2", SOFTHOOKS, HIGH, None, p_tuning_v2),
    Contestant("multitask_prompt_tuning", "MPT", SOFTHOOKS, PROMPT, None, multitask_prompt_tuning),
    Contestant(
        "peft_multitask_prompt_tuning",
        "MPT",
        PEFT,
        PROMPT,
        None,
        peft_multitask_prompt_tuning,
        "multitask_prompt_tuning",
    ),
    Contestant("llama_adapter", "LLaMA-Adapter", SOFTHOOKS, HIGH, HIGH, llama_adapter),
    Contestant("peft_llama_adapter", "LLaMA-Adapter", PEFT, None, HIGH, peft_llama_adapter, "llama_adapter"),
    Contestant("llama_adapter_v2", "LLaMA-Adapter, version 2", SOFTHOOKS, None, MIDDLE, llama_adapter_v2),
    Contestant("residual_prompt_tuning", "residual prompt tuning", SOFTHOOKS, MIDDLE, MIDDLE, residual_prompt_tuning),
    Contestant(
        "superposed_prompt_tuning", "prompt of superposed words", VARIANT, None, PROMPT, superposed_prompt_tuning
    ),
    Contestant("normalized_prompt_tuning", "prompt of fixed lengths", VARIANT, None, PROMPT, normalized_prompt_tuning),
    Contestant("context_tuning", "context tuning", SOFTHOOKS, None, MIDDLE, context_tuning),
    Contestant("cpt", "CPT", SOFTHOOKS, None, None, cpt),
    Contestant("peft_cpt", "CPT", PEFT, None, None, peft_cpt, "cpt"),
    Contestant("cartridge", "cartridge", SOFTHOOKS, None, None, cartridge),
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
"""All contestants, in the order of tables; those without learning rates occur only in the experiments on findings."""
