"""`softhooks convert`: prompts between softhooks' files and PEFT's, without a model where the files say enough.

What is written is what `softhooks.load` and `save_pretrained` would write on the model; where a file leaves open what the model
is, the base is asked for. A folder holds one prompt, or several as PEFT lays them out: `default` at its root, others in folders
of their names.
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

from softhooks.errors import CheckpointError, OptionError
from softhooks.formats import native, peft_write
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
    """Convert a prompt, or all prompts of a folder. The whole of `target` appears at once, or nothing does.

    Args:
        source: a folder of `save_pretrained`, of a Trainer, or of PEFT.
        target: a folder that is not there yet, or is empty.
        to: the format to write; None: the one that `source` has not.
        base: the folder of the model; what is written is then proven on it.
        strict: refuse a base with other weights than those in training.

    Returns:
        what was written, by name.

    Raises:
        CheckpointError: there is no prompt, or its file is truncated, foreign or hostile.
        PromptMismatchError: it does not fit the base.
        UnsupportedMethodError: the other format has nothing that means the same.
        OptionError: `target` is taken, or `source` has the format already.
    """
    found, present = prompts_in(source)
    wanted: Format = to or ("peft" if present == "softhooks" else "softhooks")
    if wanted == present:
        raise OptionError(
            "a prompt is converted to the format that it has not.",
            "Leave `--to` out, or copy the folder.",
            found=f"{source / MARKS[present]}: the format of {present}",
            asked=f"--to {wanted}",
        )
    _require_free(target)
    written: dict[str, StoredPrompt] = {}
    with _appearing(target) as folder:
        for name, path in found.items():
            stored = _read(path)
            _say_what_is_left(stored)
            write = _writer(stored, wanted, base, strict)
            write(folder if name == "default" else folder / name)
            written[name] = stored
    return written


# --- what there is ----------------------------------------------------------------------------------------------------


def prompts_in(source: Path) -> tuple[dict[str, Path], Format]:
    """The prompts of a folder by name, and their format; a folder that holds both formats holds ours beside an adapter.

    Raises:
        CheckpointError: there is none.
    """
    inside = sorted(source.iterdir()) if source.is_dir() else []
    named = [("default", source), *((path.name, path) for path in inside if not path.name.startswith("."))]
    for present, mark in MARKS.items():
        found = {name: path for name, path in named if (path / mark).is_file()}
        if found:
            return found, present
    raise explain_missing(source, tuple(MARKS.values()))


def _read(folder: Path) -> StoredPrompt:
    """Read a prompt with all options of its method; a file of PEFT names those that differ from the defaults."""
    stored = read(folder)
    stored.options = method_of(stored).options()
    return stored


def _say_what_is_left(stored: StoredPrompt) -> None:
    if stored.also_trained:
        warnings.warn(
            f"{stored.source}: {len(stored.also_trained)} parameters of the base were trained beside this prompt "
            f"({', '.join(stored.also_trained[:3])}, ...); they are not in its file, and not in what is written.",
            stacklevel=3,
        )


# --- how it is written ------------------------------------------------------------------------------------------------


def _writer(stored: StoredPrompt, wanted: Format, base: Path | None, strict: bool) -> Callable[[Path], None]:
    """Check everything, and give what writes the files."""
    model = None if base is None else _load_base(stored, base)
    if model is not None:
        with attach_stored(model, stored, "default", strict=strict) as prompt:
            if wanted == "softhooks":
                known, name = prompt.to_stored(), stored.base.name_or_path
                known.base = replace(
                    known.base, name_or_path=name, revision=stored.base.revision or known.base.revision
                )
                return lambda folder: native.write(known, folder)
            config, tensors = peft_write.adapter_of(prompt.to_stored(), model, prompt.prompted_model.structure)
            config["base_model_name_or_path"] = stored.base.name_or_path or None
            return lambda folder: peft_write.write((config, tensors), folder)
    if wanted == "peft":
        adapter = peft_write.adapter_of(stored)
        return lambda folder: peft_write.write(adapter, folder)
    _require_known(stored)
    return lambda folder: native.write(stored, folder)


def _require_known(stored: StoredPrompt) -> None:
    """Check that a file of PEFT says enough about its base to be written as one of ours.

    Raises:
        CheckpointError: it does not.
    """
    open_ = [name for name, stack in stored.stacks.items() if "causal" not in stack]
    if open_ or stored.adapter_layers:
        what = "whether its model is causal" if open_ else "whether its model computes the same"
        raise CheckpointError(
            "a prompt is stored with what it takes for granted about its model.",
            "Give the folder of its base model with `--base`.",
            file=stored.source,
            not_told=what,
            base=stored.base.name_or_path or "not named",
        )


def _load_base(stored: StoredPrompt, base: Path) -> nn.Module:
    """Load the model of a prompt from a folder: safetensors only, no code of its own, nothing from the hub.

    Raises:
        CheckpointError: it cannot be loaded as what the prompt was trained on.
    """
    import transformers

    name = stored.base.class_name
    if not name:
        name = _AUTO.get(stored.base.task or "", f"no model of task {stored.base.task!r}")
    cls = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise CheckpointError(f"{stored.source}: its base is {name}, which transformers does not have.")
    hub = {"local_files_only": True, "trust_remote_code": False}
    labels = {} if (count := _labels(stored)) is None else {"num_labels": count}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(str(base), **hub, **labels)
            _require_config(cls, config)
            model: nn.Module = cls.from_pretrained(
                str(base), config=config, use_safetensors=True, dtype=torch.float32, **hub
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            "`--base` must be the folder of the model that the prompt was trained on.",
            "Give the folder that `save_pretrained` of the model wrote, with its config.json and safetensors.",
            base=base,
            asked=f"{name}.from_pretrained",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval()


def _require_config(cls: Any, config: Any) -> None:
    """Check that a folder is of a model's class: transformers would build another at random, in a size of its own.

    Raises:
        ValueError: it is of another.
    """
    own = getattr(cls, "config_class", None)
    if own is not None and type(config) is not own:
        raise ValueError(f"a model of {type(config).__name__}, where {cls.__name__} takes {own.__name__}")


def _labels(stored: StoredPrompt) -> int | None:
    """How many labels a stored head has: the rows of its last matrix."""
    matrices = [value for head in stored.heads.values() for value in head.values() if value.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of a head that is new: the prompt brings its own."""
    import transformers

    before: Any = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


# --- where it goes ----------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    """Check that nothing is lost.

    Raises:
        OptionError: something is there.
    """
    taken = (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir()))
    if taken:
        raise OptionError(
            "a conversion writes a new folder, and overwrites nothing.",
            "Name a folder that is not there yet, or remove this one.",
            out=target,
        )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give a folder beside `target`, and move it there once all is written.

    Raises:
        OptionError: it cannot be written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)
    except OSError as error:
        raise OptionError(
            "OUT must be a folder that can be written.", "Name another one.", out=target, found=error
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
