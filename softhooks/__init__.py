"""softhooks: soft prompts on unmodified Hugging Face models.

Names are imported at their first use: `import softhooks` loads neither torch nor transformers, and `softhooks.attach` no Trainer.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from softhooks._version import __version__ as __version__

if TYPE_CHECKING:
    from softhooks.attach import attach
    from softhooks.base_model.frozen_record import FrozenReport
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
    from softhooks.kept import kept
    from softhooks.layout.layout import Layout
    from softhooks.layout.verbalizer import Verbalizer
    from softhooks.load import load
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
    from softhooks.methods.task_sampling import TaskSampler
    from softhooks.prompt import SoftPrompt
    from softhooks.similarity import most_similar, nearest_words
    from softhooks.switch import activate, disabled, rows
    from softhooks.trainer.callback import SoftPromptCallback
    from softhooks.tune import tune

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

_PLACES = {
    "attach": "attach",
    "ensemble": "EnsembleOutput EnsembleTexts PromptEnsemble",
    "errors": (
        "AttachError CheckpointError FrozenModifiedError NameTakenError NotAttachedError OptionError "
        "PromptMismatchError PromptNotReachedError PromptTooLongError SoftHooksError TrainerError "
        "UnsupportedMethodError UnsupportedModeError UnsupportedModelError"
    ),
    "base_model.frozen_record": "FrozenReport",
    "kept": "kept",
    "layout.layout": "Layout",
    "layout.verbalizer": "Verbalizer",
    "tune": "tune",
    "methods": (
        "ContextAwarePromptTuning ContextTuning LlamaAdapter MultitaskPromptTuning "
        "PrefixTuning PromptTuning PTuning PTuningV2 ResidualPromptTuning"
    ),
    "prompt": "SoftPrompt",
    "methods.task_sampling": "TaskSampler",
    "load": "Cartridge load",
    "switch": "activate disabled rows",
    "trainer.callback": "SoftPromptCallback",
    "similarity": "most_similar nearest_words",
}
"""The names of each module. `Cartridge` comes with `load`, which its `concatenate` needs."""

_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"softhooks.{_MODULE_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"softhooks.{name}"):
        value = import_module(f"softhooks.{name}")
    else:
        raise AttributeError(f"module 'softhooks' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `softhooks.attach` etc. bound to the functions when the submodules of the same names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

import softhooks.integrations  # noqa: E402, F401 - registers the Trainers of other libraries that the callback checks
