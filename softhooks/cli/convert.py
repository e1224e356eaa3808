"""Conversion of saved prompts between the formats of softhooks and PEFT, for `softhooks convert`.

The result is what `softhooks.load` and `save_pretrained` would write on the model. The base model is needed only if a file does
not say enough about it. A folder holds one prompt, or several as PEFT saves them: `default` at its root, others in subfolders
with their names.
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
from softhooks.methods.stored_options import method_of

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
    """Convert a prompt, or all prompts of a folder. `target` appears completely, or not at all.

    Args:
        source: a folder that `save_pretrained`, a Trainer, or PEFT wrote.
        target: a folder that does not exist, or is empty.
        to: the format to write; None: the other one than that of `source`.
        base: the folder of the base model; the prompts are then attached to it and checked.
        strict: refuse a base model with other weights than in training.

    Returns:
        the prompts that were converted, by name.

    Raises:
        CheckpointError: there is no prompt, or its file is damaged or contradicts itself.
        PromptMismatchError: a prompt does not fit the base model.
        UnsupportedMethodError: PEFT has no equal of a prompt.
        OptionError: `target` is not empty, or `source` has the format `to` already.
    """
    found, present = prompts_in(source)
    wanted: Format = to or ("peft" if present == "softhooks" else "softhooks")
    if wanted == present:
        raise OptionError(
            f"{source} has the format of {present} already, which `--to {wanted}` asks for.",
            "Leave `--to` out, or copy the folder.",
            found=source / MARKS[present],
        )
    _require_free(target)
    written: dict[str, StoredPrompt] = {}
    with _appearing(target) as folder:
        for name, path in found.items():
            stored = _read(path)
            _warn_of_also_trained(stored)
            write = _writer(stored, wanted, base, strict)
            write(folder if name == "default" else folder / name)
            written[name] = stored
    return written


# --- read -------------------------------------------------------------------------------------------------------------


def prompts_in(source: Path) -> tuple[dict[str, Path], Format]:
    """The prompts of a folder by name, and their format. A folder with both formats has prompts over an adapter of PEFT.

    Raises:
        CheckpointError: there are none.
    """
    inside = sorted(source.iterdir()) if source.is_dir() else []
    named = [("default", source), *((path.name, path) for path in inside if not path.name.startswith("."))]
    for present, mark in MARKS.items():
        found = {name: path for name, path in named if (path / mark).is_file()}
        if found:
            return found, present
    raise explain_missing(source, tuple(MARKS.values()))


def _read(folder: Path) -> StoredPrompt:
    """Read a prompt, and complete its options: a file of PEFT has only some of them."""
    stored = read(folder)
    stored.options = method_of(stored).options()
    return stored


def _warn_of_also_trained(stored: StoredPrompt) -> None:
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained with this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...); they are not in its file, and not in the converted one.",
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
    """Check that a file of PEFT says enough about its base model to be written in softhooks' format.

    Raises:
        CheckpointError: it does not.
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
    """Load the base model of a prompt from a folder: safetensors only, no remote code, nothing from the hub.

    Raises:
        CheckpointError: it cannot be loaded as the class that the prompt was trained on.
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
    """Refuse the config of another class of models, from which transformers would make a model with random weights."""
    own = getattr(cls, "config_class", None)
    if own is not None and type(config) is not own:
        raise ValueError(f"the config is a {type(config).__name__}; {cls.__name__} needs a {own.__name__}")


def _labels(stored: StoredPrompt) -> int | None:
    """The number of labels of a stored head: the rows of its last matrix."""
    matrices = [value for head in stored.heads.values() for value in head.values() if value.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warning about a newly initialized head: the prompt brings its own."""
    import transformers

    before: Any = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


# --- the target -------------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    """Check that nothing is overwritten.

    Raises:
        OptionError: the target exists, and is not an empty folder.
    """
    taken = (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir()))
    if taken:
        raise OptionError(
            f"{target} exists and is not an empty folder; a conversion overwrites nothing.",
            "Name a folder that does not exist, or remove this one.",
        )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, and rename it to `target` after the block.

    Raises:
        OptionError: it cannot be written.
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
