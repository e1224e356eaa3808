"""The methods. To add a method, import it here.

Importing this package does not import transformers, which takes seconds and which `softhooks inspect` does not need.
"""

from __future__ import annotations

from softhooks.method import METHODS as METHODS
from softhooks.method import Method, register

# In the order of `softhooks run --help`.
# isort: off
from softhooks.methods.prompt_tuning import PromptTuning as PromptTuning
from softhooks.methods.prefix_tuning import PrefixTuning as PrefixTuning
from softhooks.methods.p_tuning import PTuning as PTuning
from softhooks.methods.p_tuning_v2 import PTuningV2 as PTuningV2
from softhooks.methods.mpt import MultitaskPromptTuning as MultitaskPromptTuning
from softhooks.methods.cpt import ContextAwarePromptTuning as ContextAwarePromptTuning
from softhooks.methods.llama_adapter import LlamaAdapter as LlamaAdapter
from softhooks.methods.residual_prompt_tuning import ResidualPromptTuning as ResidualPromptTuning
from softhooks.methods.context_tuning import ContextTuning as ContextTuning
from softhooks.methods.cartridge import Cartridge as Cartridge
# isort: on

register(
    [
        value
        for value in tuple(globals().values())
        if isinstance(value, type) and issubclass(value, Method) and value.kind
    ]
)
