"""Load the base model of a saved prompt, with the class that it had when the prompt was trained."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from softhooks.base_model.auto_classes import auto_class_of
from softhooks.base_model.info import class_of_transformers
from softhooks.compat.quiet import without_warnings
from softhooks.errors import CheckpointError
from softhooks.formats.stored import StoredPrompt
from softhooks.load_model import label_count


def load_base(stored: StoredPrompt, base: str, option: str, *, local: bool, **options: Any) -> nn.Module:
    """Load the base model from a directory or, unless `local`, from the Hub, in fp32.

    Only safetensors files are read, and no remote code is run.

    Args:
        option: the command line option that gave `base`, for error messages.
        options: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: the class of the model is not known, or the model cannot be loaded.
    """
    import transformers

    auto = auto_class_of(stored.base.class_name, stored.base.task)
    name = stored.base.class_name or (auto.name if auto else "")
    cls: Any = class_of_transformers(name)
    if not hasattr(cls, "from_pretrained"):
        raise CheckpointError(
            f"{stored.source}: transformers has no class for this prompt's base model.",
            class_name=name or "not known",
            task=stored.base.task or "not known",
        )
    hub = {"local_files_only": local, "trust_remote_code": False}
    labels = {} if (count := label_count(stored)) is None else {"num_labels": count}
    try:
        with without_warnings():
            config = transformers.AutoConfig.from_pretrained(base, **hub, **labels)
            _check_config(config, cls)
            model: nn.Module = cls.from_pretrained(
                base, config=config, use_safetensors=True, dtype=torch.float32, **hub, **options
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        where = "" if local else ", or a name on the Hub"
        raise CheckpointError(
            f"{base}, given as `{option}`, cannot be loaded with `{name}.from_pretrained`.",
            f"Give a directory with config.json and safetensors files, written by `save_pretrained` of the base model{where}.",
            error=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval()


def _check_config(config: Any, cls: Any) -> None:
    """Refuse a config of another class, with which transformers would create a model with random weights."""
    own = getattr(cls, "config_class", None)
    if own is not None and type(config) is not own:
        raise ValueError(f"the config is a {type(config).__name__}; {cls.__name__} needs a {own.__name__}")
