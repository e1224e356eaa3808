"""The output directory of `softhooks train`: a new run needs a free one, a resumed run the settings that it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from softhooks.errors import OptionError
from softhooks.formats.files import read_json
from softhooks.method import Method
from softhooks.recipe.options import TrainOptions, learning_rate_of

SETTINGS = "settings.json"


def check(options: TrainOptions, settings: Mapping[str, Any]) -> None:
    """Check that a new run has a free directory, and that a resumed run has the settings with which it was started.

    Args:
        settings: the result of `settings_of`.

    Raises:
        OptionError: the directory of a new run is not empty; there is no run to resume; or the settings differ.
    """
    path = options.output / SETTINGS
    if not options.resume:
        if options.output.is_file() or any(entry.is_file() for entry in options.output.rglob("*")):
            remedy = "Continue the run with --resume, or" if path.is_file() else "Remove it, or"
            raise OptionError(
                f"{options.output} (--output) already exists; `softhooks train` overwrites nothing.",
                f"{remedy} name another directory with --output.",
            )
        return
    if not path.is_file():
        raise OptionError(
            f"--resume is given, but {options.output} (--output) has no {SETTINGS}, so no run was started there.",
            "Leave --resume out to start a run.",
        )
    before = read_json(path)
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        raise OptionError(
            f"{', '.join(differing)}: not the same as in the run in {options.output}; a run resumes only with equal settings.",
            "Repeat the options of the run, or start another run with another --output.",
            **{name: f"{before.get(name)} in the run, now {settings[name]}" for name in differing},
        )


def settings_of(options: TrainOptions, method: Method, callback_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the result depends on as JSON values."""
    return {
        "data": _digest(options.data),
        "validation": options.validation if isinstance(options.validation, float) else _digest(options.validation),
        "model": options.model,
        "task": options.task,
        "method": repr(method),
        "callback": {name: repr(value) for name, value in sorted(callback_options.items())},
        "text": options.text,
        "label": options.label,
        "epochs": options.epochs,
        "max_steps": options.max_steps,
        "learning_rate": learning_rate_of(options, method),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "seed": options.seed,
        "precision": options.precision,
    }


def _digest(path: Path) -> str:
    """Hash a file, so that a changed file is noticed, whatever its name."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
