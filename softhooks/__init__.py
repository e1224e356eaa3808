"""Soft prompts on unmodified Hugging Face models.

Each name is imported when it is first used: `import softhooks` loads neither torch nor transformers, and `softhooks.attach` does
not load the Trainer.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from softhooks._version import __version__ as __version__

if TYPE_CHECKING:
    from softhooks.attach import attach as attach
    from softhooks.base_model.frozen_record import FrozenReport as FrozenReport
    from softhooks.ensemble import EnsembleOutput as EnsembleOutput
    from softhooks.ensemble import EnsembleTexts as EnsembleTexts
    from softhooks.ensemble import PromptEnsemble as PromptEnsemble
    from softhooks.errors import AttachError as AttachError
    from softhooks.errors import CheckpointError as CheckpointError
    from softhooks.errors import FrozenModifiedError as FrozenModifiedError
    from softhooks.errors import NameTakenError as NameTakenError
    from softhooks.errors import NotAttachedError as NotAttachedError
    from softhooks.errors import OptionError as OptionError
    from softhooks.errors import PromptMismatchError as PromptMismatchError
    from softhooks.errors import PromptNotReachedError as PromptNotReachedError
    from softhooks.errors import PromptTooLongError as PromptTooLongError
    from softhooks.errors import SoftHooksError as SoftHooksError
    from softhooks.errors import TrainerError as TrainerError
    from softhooks.errors import UnsupportedMethodError as UnsupportedMethodError
    from softhooks.errors import UnsupportedModeError as UnsupportedModeError
    from softhooks.errors import UnsupportedModelError as UnsupportedModelError
    from softhooks.layout.layout import Layout as Layout
    from softhooks.layout.verbalizer import Verbalizer as Verbalizer
    from softhooks.load import load as load
    from softhooks.load_model import load_model as load_model
    from softhooks.methods import Cartridge as Cartridge
    from softhooks.methods import ContextAwarePromptTuning as ContextAwarePromptTuning
    from softhooks.methods import ContextTuning as ContextTuning
    from softhooks.methods import LlamaAdapter as LlamaAdapter
    from softhooks.methods import MultitaskPromptTuning as MultitaskPromptTuning
    from softhooks.methods import PrefixTuning as PrefixTuning
    from softhooks.methods import PromptTuning as PromptTuning
    from softhooks.methods import PTuning as PTuning
    from softhooks.methods import PTuningV2 as PTuningV2
    from softhooks.methods import ResidualPromptTuning as ResidualPromptTuning
    from softhooks.methods.task_sampling import TaskSampler as TaskSampler
    from softhooks.prompt import SoftPrompt as SoftPrompt
    from softhooks.serving.prompt_store import PromptStore as PromptStore
    from softhooks.similarity import most_similar as most_similar
    from softhooks.similarity import nearest_words as nearest_words
    from softhooks.switch import activate as activate
    from softhooks.switch import disabled as disabled
    from softhooks.switch import kept as kept
    from softhooks.switch import rows as rows
    from softhooks.trainer.callback import SoftPromptCallback as SoftPromptCallback
    from softhooks.tune import tune as tune

_NAMES = {
    "attach": "attach",
    "ensemble": "EnsembleOutput EnsembleTexts PromptEnsemble",
    "errors": (
        "AttachError CheckpointError FrozenModifiedError NameTakenError NotAttachedError OptionError "
        "PromptMismatchError PromptNotReachedError PromptTooLongError SoftHooksError TrainerError "
        "UnsupportedMethodError UnsupportedModeError UnsupportedModelError"
    ),
    "base_model.frozen_record": "FrozenReport",
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
    "load_model": "load_model",
    "switch": "activate disabled kept rows",
    "trainer.callback": "SoftPromptCallback",
    "serving.prompt_store": "PromptStore",
    "similarity": "most_similar nearest_words",
}
"""The public names in each module. `Cartridge` is imported with `load`, because `Cartridge.concatenate` needs that module."""

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


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
    """A package in which importing the submodule `softhooks.attach` does not replace the function `softhooks.attach`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

import softhooks.integrations  # noqa: E402, F401 - registers the Trainers of other libraries that the callback checks
