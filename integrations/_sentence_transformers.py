"""A sentence-transformers model around the prompted one: what it calls, what it saves, what it loads.

The library's classes are imported when they are used; `softhooks.integrations.sentence_transformers` is where people come in.
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
from ._inner_model import Dress, Trained, dress_of, leave_room, refuse_bare, saving_itself

PROMPTED = "PromptedTransformer"
KIND = f"softhooks.integrations.sentence_transformers.{PROMPTED}"
"""What `modules.json` calls the transformer of a model that was saved with its prompt."""

FAMILIES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
"""The library's classes of models."""

WHOLE = "Load the base model, then `load_prompt(model, folder)`; `trainer.save_model(folder)` saves a whole model."
"""What to do with a folder that holds a prompt and no model."""


def sentence_library() -> Any:
    """sentence-transformers.

    Raises:
        SoftHooksError: it is not installed.
    """
    return import_framework("sentence_transformers", "sentence-transformers", "sentence-transformers")


def transformer_of(model: Any) -> Any:
    """The one module of a sentence model that holds a transformers model.

    Raises:
        UnsupportedModelError: there is none that a prompt can enter, or more than one.
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
        why = f"it is a {type(model).__name__}"
    elif len(found) != 1 or first is not found[0] or type(first) not in (Transformer, prompted_transformer()):
        why = f"its modules are {', '.join(type(module).__name__ for module in model.children())}"
    elif first.backend != "torch":
        why = f"its backend is {first.backend}"
    elif getattr(first.model, "_hf_peft_config_loaded", False) or hasattr(first.model, "peft_config"):
        why = "it carries an adapter of PEFT"
    if why:
        raise UnsupportedModelError(
            "a prompt enters a SentenceTransformer, CrossEncoder or SparseEncoder that begins with its only Transformer.",
            "Take a model of that kind, on the torch backend, with adapters merged; SetFit's Trainer takes a "
            "`SetFitPromptCallback` (softhooks.integrations.setfit).",
            model=f"{type(model).__name__}: {why}",
        )
    return first


def dress(model: Any) -> None:
    """Let a sentence model call, save and load its inner model with the prompt; once is enough."""
    transformer = transformer_of(model)
    _dress_module(transformer).cover(model)
    leave_room(transformer, require_prompted_model(transformer.model))


def _dress_module(transformer: Any) -> Dress:
    worn = dress_of(transformer)
    return (
        Dress(transformer, prompted_transformer(), require_prompted_model(transformer.model)) if worn is None else worn
    )


# --- files ------------------------------------------------------------------------------------------------------------


@functools.cache
def prompted_transformer() -> Any:
    """The class of a sentence model's first module, where that carries a prompt."""
    sentence_library()
    from sentence_transformers.base.modules import Transformer

    class PromptedTransformer(Transformer):
        """A `Transformer` whose model carries a prompt: saved with it, and loaded with it."""

        def forward(self, features: dict[str, Any], **kwargs: Any) -> Any:
            """Refuse one prompt a row: the library sorts texts by their length before it batches them."""
            prompted = require_prompted_model(self.model)
            if prompted.rows is not None:
                raise UnsupportedModeError(
                    "the texts of a sentence model share one prompt: the library sorts them before it batches them, so that "
                    "rows would meet each other's.",
                    "Encode the texts of each prompt by themselves, with `softhooks.activate(model, name)` before.",
                    rows=prompted.rows,
                )
            return super().forward(features, **kwargs)

        def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
            """Save model, prompt, processor and config; into a Trainer's checkpoint the prompt in the model's place."""
            prompted, folder = require_prompted_model(self.model), Path(output_path)
            if saver_of(self.model) is not None and re.fullmatch(r"checkpoint-\d+", folder.name):
                super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
                return
            if len(prompted.prompts) > 1:
                raise UnsupportedModeError(
                    "a sentence model is saved with one prompt.",
                    "Remove the others, or save each with its own `save_pretrained`.",
                    prompts=", ".join(map(repr, prompted.prompts)),
                )
            with saving_itself(self.model) as state:
                self.model.save_pretrained(folder, state_dict=state)
            (prompt,) = soft_prompts_of(prompted).values()
            prompt.save_pretrained(folder)
            self.processor.save_pretrained(output_path)
            self.save_config(output_path)

        @classmethod
        def load(cls, model_name_or_path: str, subfolder: str = "", module_classes: Any = None, **kwargs: Any) -> Any:
            """Load the model and put its prompt on; of a Trainer's checkpoint, if the Trainer asks, what was trained."""
            folder = Path(model_name_or_path, subfolder)
            if module_classes and (folder / LIVE).is_file():
                return Trained(folder)
            refuse_bare(folder, WHOLE)
            module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
            source = folder if folder.is_dir() else model_name_or_path
            attach_stored(module.model, find(source, kwargs.get("revision"), kwargs.get("token")), "default")
            _dress_module(module)
            return module

        def on_model_ready(self, model: Any) -> None:
            """Freeze what else the loaded model has."""
            super().on_model_ready(model)
            dress(model)

    # The library writes module and name into `modules.json`, and imports them from there.
    PromptedTransformer.__module__, PromptedTransformer.__qualname__ = KIND.rsplit(".", 1)
    return PromptedTransformer
