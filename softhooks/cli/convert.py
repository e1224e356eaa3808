"""Conversion of saved prompts between the formats of softhooks and PEFT, for `softhooks convert`.

The result equals the files that `softhooks.load` and `save_pretrained` would write with the model. The base model is needed only
if the files do not describe it well enough. A folder holds one prompt, or several as PEFT saves them: `default` at the root, the
other prompts in subfolders with their names.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from softhooks.base_model.info import class_of_transformers
from softhooks.errors import CheckpointError, OptionError
from softhooks.formats import peft_write, softhooks_files
from softhooks.formats.find import MARKS, Format, read
from softhooks.formats.folders import explain_missing
from softhooks.formats.stored import StoredPrompt
from softhooks.load import attach_stored
from softhooks.methods.from_prompt import with_all_options

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def convert(
    source: Path, target: Path, to: Format | None = None, base: Path | None = None, strict: bool = True
) -> dict[str, StoredPrompt]:
    """Convert a prompt, or all prompts of a folder; `target` is written completely or not at all.

    Args:
        source: a folder that `save_pretrained`, a Trainer, or PEFT wrote.
        target: a folder that does not exist, or is empty.
        to: the format to write, or None for the format that `source` does not have.
        base: the folder of the base model; with it, the prompts are attached to the base model and checked.
        strict: refuse a base model if its weights differ from those in training.

    Returns:
        the prompts that were converted, by name.

    Raises:
        CheckpointError: there is no prompt, or a file is damaged or inconsistent.
        PromptMismatchError: a prompt does not fit the base model.
        UnsupportedMethodError: PEFT has no equivalent of a prompt.
        OptionError: `target` is not empty, or `source` already has the format `to`.
    """
    found, present = prompts_in(source)
    wanted: Format = to or ("peft" if present == "softhooks" else "softhooks")
    if wanted == present:
        raise OptionError(
            f"{source} is already in the format of {present}, which `--to {wanted}` requests.",
            "Leave `--to` out, or copy the folder.",
            found=source / MARKS[present],
        )
    _require_free(target)
    written: dict[str, StoredPrompt] = {}
    with _appearing(target) as folder:
        for name, path in found.items():
            stored, _ = with_all_options(read(path))
            _warn_of_also_trained(stored)
            write = _writer(stored, wanted, base, strict)
            write(folder if name == "default" else folder / name)
            written[name] = stored
    return written


# --- read -------------------------------------------------------------------------------------------------------------


def prompts_in(source: Path) -> tuple[dict[str, Path], Format]:
    """Return the prompts of a folder by name, and their format; files of both formats mean a softhooks prompt with PEFT adapters.

    Raises:
        CheckpointError: the folder has no prompts.
    """
    inside = sorted(source.iterdir()) if source.is_dir() else []
    named = [("default", source), *((path.name, path) for path in inside if not path.name.startswith("."))]
    for present, mark in MARKS.items():
        found = {name: path for name, path in named if (path / mark).is_file()}
        if found:
            return found, present
    raise explain_missing(source, tuple(MARKS.values()))


def _warn_of_also_trained(stored: StoredPrompt) -> None:
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained together with this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...); they are neither in its file nor in the converted file.",
            stacklevel=3,
        )


# --- write ------------------------------------------------------------------------------------------------------------


def _writer(stored: StoredPrompt, wanted: Format, base: Path | None, strict: bool) -> Callable[[Path], None]:
    """Check everything, and return a function that writes the files."""
    model = structure = None
    if base is not None:
        model = _load_base(stored, base)
        with attach_stored(model, stored, "default", strict=strict) as prompt:
            structure, on_base = prompt.prompted_model.structure, prompt.to_stored()
        revision = stored.base.revision or on_base.base.revision
        on_base.base = replace(on_base.base, name_or_path=stored.base.name_or_path, revision=revision)
        stored = on_base
    if wanted == "peft":
        adapter = peft_write.adapter_of(stored, model, structure)
        return lambda folder: peft_write.write(adapter, folder)
    if model is None:
        _require_known(stored)
    return lambda folder: softhooks_files.write(stored, folder)


def _require_known(stored: StoredPrompt) -> None:
    """Check that a PEFT file describes its base model well enough for softhooks' format.

    Raises:
        CheckpointError: a required fact is missing.
    """
    unknown = [name for name, stack in stored.stacks.items() if "causal" not in stack]
    if unknown or stored.adapter_layers:
        question = "its base model is causal" if unknown else "softhooks computes the same in its base model"
        raise CheckpointError(
            f"{stored.source} does not tell whether {question}.",
            "Give the folder of the base model with `--base`.",
            base=stored.base.name_or_path or "not named",
        )


def _load_base(stored: StoredPrompt, base: Path) -> nn.Module:
    """Load the base model of a prompt from a folder: only safetensors, no remote code, nothing from the Hub.

    Raises:
        CheckpointError: the model cannot be loaded with the class that the prompt was trained on.
    """
    import transformers

    name = stored.base.class_name
    if not name:
        name = _AUTO.get(stored.base.task or "", f"no model of task {stored.base.task!r}")
    cls: Any = class_of_transformers(name)
    if not hasattr(cls, "from_pretrained"):
        raise CheckpointError(f"{stored.source}: its base model is {name}, which transformers does not have.")
    hub = {"local_files_only": True, "trust_remote_code": False}
    labels = {} if (count := _labels(stored)) is None else {"num_labels": count}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(str(base), **hub, **labels)
            _check_config(config, cls)
            model: nn.Module = cls.from_pretrained(
                str(base), config=config, use_safetensors=True, dtype=torch.float32, **hub
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{base}, given as `--base`, cannot be loaded with `{name}.from_pretrained`.",
            "Give the folder that `save_pretrained` of the base model wrote, with its config.json and safetensors.",
            error=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval()


def _check_config(config: Any, cls: Any) -> None:
    """Refuse a config of a different model class, because transformers would create a model with random weights from it."""
    own = getattr(cls, "config_class", None)
    if own is not None and type(config) is not own:
        raise ValueError(f"the config is a {type(config).__name__}; {cls.__name__} needs a {own.__name__}")


def _labels(stored: StoredPrompt) -> int | None:
    """Return the number of labels of a stored head: the number of rows of its last matrix."""
    matrices = [value for head in stored.heads.values() for value in head.values() if value.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warning about a newly initialized head, because the prompt's own head replaces it."""
    import transformers

    before: Any = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


# --- the target -------------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        OptionError: the target exists and is not an empty folder.
    """
    taken = (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir()))
    if taken:
        raise OptionError(
            f"{target} exists and is not an empty folder; a conversion overwrites nothing.",
            "Name a folder that does not exist, or remove this one.",
        )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, and rename it to `target` after the `with` block.

    Raises:
        OptionError: the folder cannot be written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)
    except OSError as error:
        raise OptionError(f"the folder OUT, {target}, cannot be written: {error}.", "Name another one.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
