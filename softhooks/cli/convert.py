"""Convert saved prompts between the formats of softhooks and PEFT, for `softhooks convert`.

The files are the same as if each prompt were loaded onto its base model and saved. A folder contains one prompt, or several,
arranged as in PEFT: `default` at the root, and every other prompt in a subfolder with its name.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from softhooks.analysis.load_base import load_base
from softhooks.errors import CheckpointError, OptionError
from softhooks.formats import peft_write, softhooks_files
from softhooks.formats.find import MARKS, Format, explain_missing, read
from softhooks.formats.stored import StoredPrompt
from softhooks.load import attach_stored
from softhooks.methods.from_prompt import with_all_options


def convert(
    source: Path, target: Path, to: Format | None = None, base: Path | None = None, strict: bool = True
) -> dict[str, StoredPrompt]:
    """Convert all prompts in a folder, and return them by name; `softhooks convert --help` describes the options."""
    found, present = prompts_in(source)
    wanted: Format = to or ("peft" if present == "softhooks" else "softhooks")
    if wanted == present:
        raise OptionError(
            f"{source} is already in the format that `--to {wanted}` requests.",
            "Leave `--to` out, or copy the folder.",
            found=source / MARKS[present],
        )
    _require_free(target)
    written: dict[str, StoredPrompt] = {}
    with _appearing(target) as folder:
        for name, path in found.items():
            written[name], _ = with_all_options(read(path))
            _warn_of_also_trained(written[name])
            _write(written[name], folder if name == "default" else folder / name, wanted, base, strict)
    return written


# --- read -------------------------------------------------------------------------------------------------------------


def prompts_in(source: Path) -> tuple[dict[str, Path], Format]:
    """Return the paths of the prompts in a folder by prompt name, and the prompts' format.

    A folder with files of both formats holds a softhooks prompt that was saved together with PEFT's adapters.
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
            f"{stored.source}: {len(stored.also_trained)} parameters of the base model were trained with this prompt "
            f"({', '.join(map(repr, stored.also_trained[:3]))}, ...); neither its file nor the converted file contains them.",
            stacklevel=3,
        )


# --- write ------------------------------------------------------------------------------------------------------------


def _write(stored: StoredPrompt, folder: Path, wanted: Format, base: Path | None, strict: bool) -> None:
    model = structure = None
    if base is not None:
        model = load_base(stored, str(base), "--base", local=True)
        with attach_stored(model, stored, "default", strict=strict) as prompt:
            structure, on_base = prompt.prompted_model.structure, prompt.to_stored()
        revision = stored.base.revision or on_base.base.revision
        on_base.base = replace(on_base.base, name_or_path=stored.base.name_or_path, revision=revision)
        stored = on_base
    if wanted == "peft":
        peft_write.write(peft_write.adapter_of(stored, model, structure), folder)
        return
    if model is None:
        _require_known(stored)
    softhooks_files.write(stored, folder)


def _require_known(stored: StoredPrompt) -> None:
    """Check that PEFT's file contains all facts about the base model that softhooks' format requires."""
    unknown = [name for name, stack in stored.stacks.items() if "causal" not in stack]
    if unknown or stored.adapter_layers:
        question = "is causal" if unknown else "computes the same outputs with softhooks"
        raise CheckpointError(
            f"{stored.source} does not show whether its base model {question}.",
            "Give the directory of the base model with `--base`.",
            base=stored.base.name_or_path or "not named",
        )


# --- the target -------------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    taken = (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir()))
    if taken:
        raise OptionError(
            f"{target} exists and is not an empty directory; `softhooks convert` overwrites nothing.",
            "Name a directory that does not exist, or remove this one.",
        )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, and rename it to `target` after the `with` block."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)
    except OSError as error:
        raise OptionError(f"OUT ({target}) cannot be written: {error}.", "Name another directory.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
