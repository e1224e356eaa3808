"""The methods, one file a paper. A new one is listed here."""

from __future__ import annotations

from softhooks.method import Method
from softhooks.methods.cartridge import Cartridge
from softhooks.methods.context_tuning import ContextTuning
from softhooks.methods.cpt import ContextAwarePromptTuning
from softhooks.methods.llama_adapter import LlamaAdapter
from softhooks.methods.mpt import MultitaskPromptTuning
from softhooks.methods.p_tuning import PTuning
from softhooks.methods.p_tuning_v2 import PTuningV2
from softhooks.methods.prefix_tuning import PrefixTuning
from softhooks.methods.prompt_tuning import PromptTuning
from softhooks.methods.residual_prompt_tuning import ResidualPromptTuning

METHODS: dict[str, type[Method]] = {
    method.kind: method
    for method in (
        PromptTuning,
        PrefixTuning,
        PTuning,
        PTuningV2,
        MultitaskPromptTuning,
        ContextAwarePromptTuning,
        LlamaAdapter,
        ResidualPromptTuning,
        ContextTuning,
        Cartridge,
    )
}

__all__ = [
    "METHODS",
    "Cartridge",
    "ContextAwarePromptTuning",
    "ContextTuning",
    "LlamaAdapter",
    "MultitaskPromptTuning",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "ResidualPromptTuning",
]
