"""softhooks: soft prompts on unmodified Hugging Face models."""

__version__ = "0.1.0"

from softhooks.attach import attach
from softhooks.checkpoint import load
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
from softhooks.loop import tune
from softhooks.methods import PrefixTuning, PromptTuning
from softhooks.prompt import SoftPrompt
from softhooks.switch import activate, disabled, rows
from softhooks.trainer import SoftPromptCallback

__all__ = [
    "AttachError",
    "CheckpointError",
    "FrozenModifiedError",
    "FrozenReport",
    "NameTakenError",
    "NotAttachedError",
    "OptionError",
    "PrefixTuning",
    "PromptMismatchError",
    "PromptNotReachedError",
    "PromptTooLongError",
    "PromptTuning",
    "SoftHooksError",
    "SoftPrompt",
    "SoftPromptCallback",
    "TrainerError",
    "UnsupportedMethodError",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "activate",
    "attach",
    "disabled",
    "load",
    "rows",
    "tune",
]
