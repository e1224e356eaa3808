"""Run, save and load the transformers model inside a sentence-transformers model (a "sentence model") with a prompt.

The transformers model is called the inner model. A checkpoint holds only its trained tensors. To resume, the library loads the
checkpoint as a second sentence model, whose first module is a `TrainedTensors`, and copies the state dict of this second model
into the model that is being trained.
"""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from softhooks.errors import CheckpointError, UnsupportedModeError, UnsupportedModelError
from softhooks.integration_support import Patches
from softhooks.integration_support.checkpoints import LIVE, is_prompt_key, read_tensors, saver_of
from softhooks.integration_support.models import require_prompted_model, route_direct_calls, soft_prompts_of
from softhooks.integration_support.saved_prompts import attach_stored, find

from ._imports import import_framework

logger = logging.getLogger(__name__)

KIND = "softhooks.integrations.sentence_transformers.PromptedTransformer"
"""The class that `modules.json` names for the first module of a sentence model that was saved with its prompt."""

FAMILIES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
"""The library's classes of models."""

_WRAPPER = "_soft_prompt_wrapper"
_POOL = "start_multi_process_pool"


def sentence_library() -> Any:
    """Import the package sentence_transformers."""
    return import_framework("sentence_transformers", "sentence-transformers", "sentence-transformers")


def transformer_of(model: Any) -> Any:
    """Return the module that contains the only transformers model of a sentence model.

    Raises:
        UnsupportedModelError: there is no such module, or its model cannot have a prompt.
    """
    library = sentence_library()
    from sentence_transformers.base.modules import Transformer

    is_known = isinstance(model, tuple(getattr(library, family) for family in FAMILIES))
    found = [module for module in model.modules() if isinstance(module, Transformer)] if is_known else []
    first = next(iter(model.children()), None) if found else None
    why = ""
    if not is_known:
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


# --- files ------------------------------------------------------------------------------------------------------------


def refuse_checkpoint(folder: Path) -> None:
    """Raise an error if a directory is a Trainer's checkpoint, which lacks the base."""
    if (folder / LIVE).is_file():
        raise CheckpointError(
            f"{folder} is a Trainer's checkpoint, which holds only the prompt and not the base.",
            "Load the base model, then `load_prompt(model, folder)`; `trainer.save_model(folder)` saves a whole model.",
        )


@functools.cache
def prompted_transformer() -> Any:
    """Return the class that a sentence model's first module has while the inner model has a prompt."""
    sentence_library()
    from sentence_transformers.base.modules import Transformer

    class PromptedTransformer(Transformer):
        """A `Transformer` that saves and loads its model with the prompt."""

        def forward(self, features: dict[str, Any], **kwargs: Any) -> Any:
            """Refuse a different prompt for each row, because the library sorts texts by length before batching."""
            prompted = require_prompted_model(self.model)
            if prompted.rows is not None:
                raise UnsupportedModeError(
                    "`rows` cannot be used with a sentence model, because the library sorts the texts before it builds batches.",
                    "Encode the texts of each prompt separately, after `softhooks.activate(model, name)`.",
                    rows=prompted.rows,
                )
            return super().forward(features, **kwargs)

        def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
            """Save the model, prompt, processor and config; in a Trainer's checkpoint, save the prompt instead of the model."""
            prompted, folder = require_prompted_model(self.model), Path(output_path)
            if saver_of(self.model) is not None and re.fullmatch(r"checkpoint-\d+", folder.name):
                super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
                return
            if len(prompted.prompts) > 1:
                raise UnsupportedModeError(
                    f"the sentence model has the prompts {', '.join(map(repr, prompted.prompts))}; only one can be saved.",
                    "Remove the other prompts, or save each prompt with its own `save_pretrained`.",
                )
            with Patches() as patches:
                # a callback may have replaced the model's `save_pretrained` by one that writes only the prompt
                for name in ("save_pretrained", "_keys_to_ignore_on_save"):
                    patches.delete(self.model, name)
                state = {name: tensor for name, tensor in self.model.state_dict().items() if not is_prompt_key(name)}
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
            refuse_checkpoint(folder)
            module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
            source = folder if folder.is_dir() else model_name_or_path
            attach_stored(module.model, find(source, kwargs.get("revision"), kwargs.get("token")), "default")
            ModuleWrapper.of(module)
            return module

        def on_model_ready(self, model: Any) -> None:
            """Wrap the loaded sentence model."""
            super().on_model_ready(model)
            wrap_sentence_model(model)

    # The library writes this module and name into `modules.json`, and uses them to import the class.
    PromptedTransformer.__module__, PromptedTransformer.__qualname__ = KIND.rsplit(".", 1)
    return PromptedTransformer


class TrainedTensors(nn.Module):
    """A module whose state dict holds the trained tensors of a checkpoint, with names that begin with `model.`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.model = nn.Module()
        for name, tensor in read_tensors(checkpoint / LIVE)[0].items():
            *parents, leaf = name.split(".")
            holder = self.model
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.register_buffer(leaf, tensor)


def _add_base(model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Before a state dict is loaded, check that it belongs to the prompt that is being trained, and add the base to it."""
    saver = saver_of(model)
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    base = {name for name in model.state_dict() if not is_prompt_key(name)}
    if not prefix or saver is None or base <= mine.keys():
        return
    checked = dict(mine)
    if saver.prompt.is_attached:
        saver.check(checked)
    for name in mine.keys() - checked.keys():  # the description in the checkpoint, which is not a tensor of the model
        del state[prefix + name]
    for name, tensor in model.state_dict().items():
        state.setdefault(prefix + name, tensor)


# --- the sentence model around the inner model ------------------------------------------------------------------------


def wrap_sentence_model(model: Any) -> None:
    """Make a sentence model run, save and load its inner model with the prompt. Calling it again does nothing."""
    transformer = transformer_of(model)
    ModuleWrapper.of(transformer).freeze_others(model)
    _limit_text_length(transformer)


class ModuleWrapper:
    """Changes the first module of a sentence model until the last prompt of its inner model is removed.

    Args:
        module: the first module; its attribute `model` is the inner model.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.prompted = require_prompted_model(module.model)
        kind = prompted_transformer()
        # a module that was loaded with its prompt already has this class
        self._original_class = kind.__mro__[1] if type(module) is kind else type(module)
        self._others: list[tuple[nn.Parameter, bool]] = []
        route_direct_calls(self.prompted)
        patches = self.prompted.patches
        if getattr(module, "can_flatten_inputs", False):
            patches.set(module, "can_flatten_inputs", False)
        patches.keep(module.model.register_load_state_dict_pre_hook(_add_base))
        patches.keep(self)
        module.__dict__[_WRAPPER] = self
        module.__class__ = kind

    @classmethod
    def of(cls, module: Any) -> ModuleWrapper:
        """Return the wrapper of a module; the first call creates it."""
        return module.__dict__.get(_WRAPPER) or cls(module)

    def freeze_others(self, model: nn.Module) -> None:
        """Freeze the other modules of the sentence model, and refuse multi-process pools."""
        if model.__dict__.get(_POOL) is not _refuse_pool:
            self.prompted.patches.set(model, _POOL, _refuse_pool)
        known = {id(parameter) for parameter in self.module.model.parameters()}
        known |= {id(parameter) for parameter, _ in self._others}
        for parameter in model.parameters():
            if id(parameter) not in known:
                self._others.append((parameter, parameter.requires_grad))
        for parameter, _ in self._others:
            parameter.requires_grad_(False)

    def remove(self) -> None:
        """Restore the class of the module, and `requires_grad` of the other modules' parameters."""
        self.module.__class__ = self._original_class
        self.module.__dict__.pop(_WRAPPER, None)
        for parameter, flag in self._others:
            parameter.requires_grad_(flag)
        self._others.clear()


def _refuse_pool(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise UnsupportedModeError(
        "a multi-process pool would encode without the prompt, which exists only in this process.",
        "Encode in this process, on one device, or load the saved model in your own processes.",
    )


def _limit_text_length(module: Any) -> None:
    """Lower `max_seq_length` while the model has prompts, so that every text token and virtual token has a position."""
    prompted = require_prompted_model(module.model)
    slots = [prompt.layout.num_slots for prompt in prompted.prompts.values() if prompt.injection in ("slots", "shared")]
    limit, asked = prompted.structure.entry.positions.limit, module.max_seq_length
    if slots and limit is not None and asked is not None and asked + max(slots) > limit:
        prompted.patches.keep(_TextLength(module, asked))
        module.max_seq_length = limit - max(slots)
        logger.warning(
            "while the prompt is attached, texts are truncated to %d tokens instead of %d, because its %d virtual tokens take up "
            "positions",
            module.max_seq_length,
            asked,
            max(slots),
        )


class _TextLength:
    """The `max_seq_length` of a module before it was lowered."""

    def __init__(self, module: Any, length: int) -> None:
        self.module = module
        self.length = length

    def remove(self) -> None:
        """Restore the length; if it was lowered for two prompts, the greater of the stored values is the original one."""
        self.module.max_seq_length = max(self.length, self.module.max_seq_length)
