"""Find the files of a saved prompt in a directory or on the Hub and read them, or explain what the directory contains instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from softhooks.backbone.container import CONTAINER
from softhooks.errors import CheckpointError
from softhooks.formats import peft_read, softhooks_files
from softhooks.formats.download import download
from softhooks.formats.files import read_json
from softhooks.formats.stored import StoredPrompt

Format = Literal["softhooks", "peft"]
MARKS: dict[Format, str] = {"softhooks": softhooks_files.TENSORS, "peft": peft_read.CONFIG}
"""The file that identifies a saved prompt, by format."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of sharded weights
_TRAINER_STATE = "trainer_state.json"
_MAX_LISTED = 8
_MAX_STATE_BYTES = 64 * 2**20  # the `trainer_state.json` of a long run; larger files are not parsed


def find(path: str | Path, revision: str | None = None, token: str | bool | None = None) -> StoredPrompt:
    """Read a prompt from a directory or from the Hub."""
    return read(Path(path)) if _exists(Path(path)) else find_on_hub(str(path), revision, token)


def find_on_hub(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> StoredPrompt:
    """Read a prompt from a repository on the Hub."""
    folder, commit = download(repo_id, revision, token)
    stored = read(folder)
    stored.loaded_from = commit
    return stored


def format_of(folder: Path) -> Format | None:
    """Return the format of the prompt in a folder, or None if there is no prompt."""
    # A softhooks prompt may be next to the PEFT adapter that it was trained with, so softhooks' format comes first.
    return next((name for name, mark in MARKS.items() if (folder / mark).is_file()), None)


def read(folder: Path) -> StoredPrompt:
    """Read a prompt from a directory, in either format; raise a `CheckpointError` if there is none or it is damaged."""
    found = format_of(folder)
    if found is None:
        raise explain_missing(folder, tuple(MARKS.values()))
    return softhooks_files.read(folder / softhooks_files.TENSORS) if found == "softhooks" else peft_read.read(folder)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long for a file
        return False


# --- a folder without a prompt ----------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the name of a Trainer's checkpoint, such as `checkpoint-500`."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


def explain_missing(folder: Path, marks: tuple[str, ...]) -> CheckpointError:
    """Return the error for a folder that contains none of the files in `marks`, each of which identifies a prompt."""
    inside = [entry for entry in _entries(folder) if any((entry / mark).is_file() for mark in marks)]
    if inside:
        return _prompts_inside(folder, sorted(inside, key=_order))
    tensors = sorted(set(_prompt_tensors(folder)))
    if tensors:
        return _whole_model(folder, tensors)
    return CheckpointError(
        "the directory does not contain a saved prompt.",
        "Pass the directory that `save_pretrained` wrote.",
        directory=folder,
        expected=" or ".join(marks),
    )


def _prompts_inside(folder: Path, inside: list[Path]) -> CheckpointError:
    checkpoints = [entry for entry in inside if is_checkpoint(entry)]
    best = _best_of(checkpoints)
    listed = ", ".join(entry.name for entry in inside[-_MAX_LISTED:])
    values: dict[str, object] = {"directory": folder}
    values["prompts inside"] = listed if len(inside) <= _MAX_LISTED else f"{len(inside)}, the last of them {listed}"
    if checkpoints:
        values["last"] = checkpoints[-1].name
    if best is not None:
        values["best"] = f"{best.name} ({_TRAINER_STATE} of {checkpoints[-1].name})"
    wanted = best or (checkpoints or inside)[-1]
    remedy = f"Load one of them: `softhooks.load(model, {str(wanted)!r})`."
    if best is not None and best != checkpoints[-1]:
        remedy = remedy[:-1] + f" (the best), `softhooks.load(model, {str(checkpoints[-1])!r})` (the last)."
    return CheckpointError("the directory contains no saved prompt, but its subdirectories do.", remedy, **values)


def _whole_model(folder: Path, tensors: list[str]) -> CheckpointError:
    return CheckpointError(
        "the directory contains the weights of a whole model with a prompt, as written by tools that save a plain state dict; "
        "`from_pretrained` would drop the prompt.",
        "Attach the prompt again with the method and the name that it was trained with, load these tensors with "
        "`model.load_state_dict(tensors, strict=False)`, where tensors = {name: tensor for name, tensor in "
        f'safetensors.torch.load_file(file).items() if "{CONTAINER}." in name}}, and save it with '
        "`prompt.save_pretrained(directory)`.",
        directory=folder,
        tensors=", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""),
    )


def _best_of(checkpoints: list[Path]) -> Path | None:
    """Return the best checkpoint, as recorded in the last one's `trainer_state.json`; None if it no longer exists."""
    if not checkpoints:
        return None
    path = _read_json(checkpoints[-1] / _TRAINER_STATE).get("best_model_checkpoint")
    name = re.split(r"[/\\]", path)[-1] if isinstance(path, str) else None  # the folder may have moved since
    return next((entry for entry in checkpoints if entry.name == name), None)


def _prompt_tensors(folder: Path) -> Iterator[str]:
    """Yield the names of prompt tensors in the weights of a whole model; skip files that cannot be read."""
    for file in sorted(entry for entry in _entries(folder) if entry.suffix == ".safetensors"):
        try:
            with safe_open(str(file), framework="pt") as weights:
                yield from filter(_belongs_to_prompt, weights.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError):
            continue
    for name in _INDEX_FILES:
        weight_map = _read_json(folder / name).get("weight_map")
        yield from filter(_belongs_to_prompt, weight_map if isinstance(weight_map, dict) else {})


def _belongs_to_prompt(name: str) -> bool:
    return CONTAINER in name.split(".")[:-1]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _order(entry: Path) -> tuple[bool, int, str]:
    """Return a sort key that sorts checkpoints by step, after all other folders."""
    match = _CHECKPOINT.fullmatch(entry.name)
    return match is not None, int(match[1]) if match else 0, entry.name


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; return an empty dictionary if the file is too large or does not contain one."""
    try:
        return read_json(path, _MAX_STATE_BYTES)
    except CheckpointError:
        return {}
