"""The contestants: softhooks' methods, PEFT's versions of them, LoRA, the head alone, and full fine-tuning."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.quality.peft_methods import (
    lora,
    peft_llama_adapter,
    peft_p_tuning,
    peft_prefix_tuning,
    peft_prompt_tuning,
)
from benchmarks.quality.setup import Contestant, Prepared, Setup
from benchmarks.quality.softhooks_methods import (
    cartridge,
    cpt,
    llama_adapter,
    multitask_prompt_tuning,
    p_tuning,
    p_tuning_v2,
    prefix_tuning,
    prompt_tuning,
    residual_prompt_tuning,
)


def head(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Train the new head alone."""
    model.base_model.requires_grad_(False)
    return Prepared(model)


def full(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Train all weights."""
    return Prepared(model)


LOW, MIDDLE, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
PROMPT_RATES = (5e-3, 2e-2, 1e-1)
SOFTHOOKS, PEFT, TRANSFORMERS = "softhooks", "PEFT", "transformers"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("head", "head only", TRANSFORMERS, HIGH, None, head),
        Contestant("full", "full fine-tuning", TRANSFORMERS, (5e-5, 2e-4, 5e-4), None, full),
        Contestant("lora", "LoRA, r = 8", PEFT, MIDDLE, LOW, lora),
        Contestant(
            "peft_prompt_tuning", "prompt tuning", PEFT, PROMPT_RATES, PROMPT_RATES, peft_prompt_tuning, "prompt_tuning"
        ),
        Contestant("peft_prefix_tuning", "prefix tuning", PEFT, HIGH, HIGH, peft_prefix_tuning, "prefix_tuning"),
        Contestant("peft_p_tuning", "P-tuning", PEFT, MIDDLE, MIDDLE, peft_p_tuning, "p_tuning"),
        Contestant("peft_llama_adapter", "LLaMA-Adapter", PEFT, None, HIGH, peft_llama_adapter, "llama_adapter"),
        Contestant("prompt_tuning", "prompt tuning", SOFTHOOKS, PROMPT_RATES, PROMPT_RATES, prompt_tuning),
        Contestant("prefix_tuning", "prefix tuning", SOFTHOOKS, HIGH, HIGH, prefix_tuning),
        Contestant("p_tuning", "P-tuning", SOFTHOOKS, MIDDLE, MIDDLE, p_tuning),
        Contestant("p_tuning_v2", "P-tuning v2", SOFTHOOKS, HIGH, HIGH, p_tuning_v2),
        Contestant("multitask_prompt_tuning", "MPT", SOFTHOOKS, PROMPT_RATES, PROMPT_RATES, multitask_prompt_tuning),
        Contestant("llama_adapter", "LLaMA-Adapter", SOFTHOOKS, HIGH, HIGH, llama_adapter),
        Contestant("cpt", "CPT", SOFTHOOKS, None, MIDDLE, cpt),
        Contestant("cartridge", "cartridge", SOFTHOOKS, None, None, cartridge),
        Contestant(
            "residual_prompt_tuning",
            "residual prompt tuning",
            SOFTHOOKS,
            PROMPT_RATES,
            PROMPT_RATES,
            residual_prompt_tuning,
        ),
    )
}
