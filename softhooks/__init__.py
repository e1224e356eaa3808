"""softhooks: soft prompts on unmodified Hugging Face models."""

__version__ = "0.1.0"

from softhooks.attach import attach
from softhooks.ensemble import EnsembleOutput, EnsembleTexts, PromptEnsemble
from softhooks.errors import (
    AttachError,
    CheckpointError,
    FrozenModifiedError,
    NameTakenError,
    NotAttachedError,
    OptionError,
    PromptMismatchError,
    PromptNotReachedError,
    PromptTooLongError,
    SoftHooksError,
    TrainerError,
    UnsupportedMethodError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from softhooks.frozen import FrozenReport
from softhooks.kept import kept
from softhooks.layout.places import Layout
from softhooks.layout.verbalizer import Verbalizer
from softhooks.loop import tune
from softhooks.methods import (
    Cartridge,
    ContextAwarePromptTuning,
    ContextTuning,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
)
from softhooks.prompt import SoftPrompt
from softhooks.sampling import TaskSampler
from softhooks.saving.checkpoint import load
from softhooks.switch import activate, disabled, rows
from softhooks.trainer.callback import SoftPromptCallback
from softhooks.transfer import most_similar
from softhooks.words import nearest_words

__all__ = [
    "AttachError",
    "Cartridge",
    "CheckpointError",
    "ContextAwarePromptTuning",
    "ContextTuning",
    "EnsembleOutput",
    "EnsembleTexts",
    "FrozenModifiedError",
    "FrozenReport",
    "Layout",
    "LlamaAdapter",
    "MultitaskPromptTuning",
    "NameTakenError",
    "NotAttachedError",
    "OptionError",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptEnsemble",
    "PromptMismatchError",
    "PromptNotReachedError",
    "PromptTooLongError",
    "PromptTuning",
    "ResidualPromptTuning",
    "SoftHooksError",
    "SoftPrompt",
    "SoftPromptCallback",
    "TaskSampler",
    "TrainerError",
    "UnsupportedMethodError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "Verbalizer",
    "activate",
    "attach",
    "disabled",
    "kept",
    "load",
    "most_similar",
    "nearest_words",
    "rows",
    "tune",
]
