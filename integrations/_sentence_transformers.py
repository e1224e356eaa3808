"""A sentence-transformers model that calls, saves and loads its transformers model with a prompt.

sentence-transformers is imported when it is used. The public functions are in `softhooks.integrations.sentence_transformers`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from softhooks.errors import UnsupportedModeError, UnsupportedModelError
from softhooks.integration_support.checkpoints import LIVE, saver_of
from softhooks.integration_support.models import require_prompted_model, soft_prompts_of
from softhooks.integration_support.saved_prompts import attach_stored, find

from ._imports import import_framework
from ._inner_model import (
    ModuleWrapper,
    TrainedTensors,
    limit_text_length,
    own_save_pretrained,
    refuse_checkpoint,
    wrapper_of,
)

PROMPTED = "PromptedTransformer"
KIND = f"softhooks.integrations.sentence_transformers.{PROMPTED}"
"""The class in `modules.json` of the first module of a model that was saved with its prompt."""

FAMILIES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
"""The library's classes of models."""

WHOLE = "Load the base model, then `load_prompt(model, folder)`; `trainer.save_model(folder)` saves a whole model."
"""The remedy for a directory with a prompt but no model."""


def sentence_library() -> Any:
    """Import the package sentence_transformers.

    Raises:
        SoftHooksError: the package is not installed.
    """
    return import_framework("sentence_transformers", "sentence-transformers", "sentence-transformers")


def transformer_of(model: Any) -> Any:
    """Return the module of a sentence model that contains its only transformers model.

    Raises:
        UnsupportedModelError: there is no such module, or its model cannot have a prompt.
    """
    library = sentence_library()
    from sentence_transformers.base.modules import Transformer

    families = tuple(getattr(library, family) for family in FAMILIES)
    found = (
        [module for module in model.modules() if isinstance(module, Transformer)] if isinstance(model, families) else []
    )
    first = next(iter(model.children()), None) if found else None
    why = ""
    if not isinstance(model, families):
        why = f"it is none of {', '.join(FAMILIES)}"
    elif len(found) != 1 or first is not found[0] or type(first) not in (Transformer, prompted_transformer()):
        why = f"its modules are {', '.join(type(module).__name__ for module in model.children())}"
    elif first.backend != "torch":
        why = f"its backend is {first.backend}"
    elif getattr(first.model, "_hf_peft_config_loaded", False) or hasattr(first.model, "peft_config"):
        why = "it has a PEFT adapter"
    if why:
        raise UnsupportedModelError(
            f"a prompt cannot be attached to this {type(model).__name__}: {why}.",
            "Use a SentenceTransformer, CrossEncoder or SparseEncoder whose first module is its only Transformer, with the torch "
            "backend and merged adapters; for SetFit, use `SetFitPromptCallback` (softhooks.integrations.setfit).",
        )
    return first


def wrap_sentence_model(model: Any) -> None:
    """Make a sentence model call, save and load its inner model with the prompt. Calling it again does nothing."""
    transformer = transformer_of(model)
    _wrap_module(transformer).freeze_others(model)
    limit_text_length(transformer, require_prompted_model(transformer.model))


def _wrap_module(transformer: Any) -> ModuleWrapper:
    wrapper = wrapper_of(transformer)
    if wrapper is None:
        wrapper = ModuleWrapper(transformer, prompted_transformer(), require_prompted_model(transformer.model))
    return wrapper


# --- files ------------------------------------------------------------------------------------------------------------


@functools.cache
def prompted_transformer() -> Any:
    """Return the class that a sentence model's first module has while its model has a prompt."""
    sentence_library()
    from sentence_transformers.base.modules import Transformer

    class PromptedTransformer(Transformer):
        """A `Transformer` that saves and loads its model with the prompt."""

        def forward(self, features: dict[str, Any], **kwargs: Any) -> Any:
            """Refuse one prompt per row, because the library sorts texts by length before batching."""
            prompted = require_prompted_model(self.model)
            if prompted.rows is not None:
                raise UnsupportedModeError(
                    "`rows` cannot be used with a sentence model, because the library sorts the texts before batching.",
                    "Encode the texts of each prompt separately, after `softhooks.activate(model, name)`.",
                    rows=prompted.rows,
                )
            return super().forward(features, **kwargs)

        def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
            """Save model, prompt, processor and config; in a Trainer's checkpoint, save the prompt instead of the model."""
            prompted, folder = require_prompted_model(self.model), Path(output_path)
            if saver_of(self.model) is not None and re.fullmatch(r"checkpoint-\d+", folder.name):
                super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
                return
            if len(prompted.prompts) > 1:
                raise UnsupportedModeError(
                    f"the sentence model has the prompts {', '.join(map(repr, prompted.prompts))}; it can be saved with one.",
                    "Remove the other prompts, or save each prompt with its own `save_pretrained`.",
                )
            with own_save_pretrained(self.model) as state:
                self.model.save_pretrained(folder, state_dict=state)
            (prompt,) = soft_prompts_of(prompted).values()
            prompt.save_pretrained(folder)
            self.processor.save_pretrained(output_path)
            self.save_config(output_path)

        @classmethod
        def load(cls, model_name_or_path: str, subfolder: str = "", module_classes: Any = None, **kwargs: Any) -> Any:
            """Load the model and its prompt; for a Trainer that resumes, load only the trained tensors of its checkpoint."""
            folder = Path(model_name_or_path, subfolder)
            if module_classes and (folder / LIVE).is_file():
                return TrainedTensors(folder)
            refuse_checkpoint(folder, WHOLE)
            module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
            source = folder if folder.is_dir() else model_name_or_path
            attach_stored(module.model, find(source, kwargs.get("revision"), kwargs.get("token")), "default")
            _wrap_module(module)
            return module

        def on_model_ready(self, model: Any) -> None:
            """Wrap the loaded sentence model."""
            super().on_model_ready(model)
            wrap_sentence_model(model)

    # The library writes this module and name into `modules.json`, and uses them to import the class.
    PromptedTransformer.__module__, PromptedTransformer.__qualname__ = KIND.rsplit(".", 1)
    return PromptedTransformer
