"""A folder that holds no prompt: what it holds instead, and what to load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from softhooks.backbone.container import CONTAINER
from softhooks.errors import CheckpointError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # as the Trainer names them
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of sharded checkpoints
_STATE = "trainer_state.json"  # the Trainer's own name for it
_MANY = 8
_SMALL = 64 * 2**20  # no JSON that is read here is larger


def explain_missing(folder: Path, marks: tuple[str, ...]) -> CheckpointError:
    """The error for a folder without a prompt: it names the prompts inside, or the whole model that it holds.

    Args:
        folder: where a prompt was expected.
        marks: the files of which a prompt has one.
    """
    inside = sorted(
        (entry for entry in _entries(folder) if any((entry / mark).is_file() for mark in marks)), key=_order
    )
    if inside:
        return _prompts_inside(folder, inside)
    stray = sorted(set(stray_tensors(folder)))
    if stray:
        return _whole_model(folder, stray)
    return CheckpointError(
        "a saved prompt is a directory with its tensors.",
        "Give the directory that `save_pretrained` wrote.",
        directory=folder,
        expected=" or ".join(marks),
    )


def _prompts_inside(folder: Path, inside: list[Path]) -> CheckpointError:
    checkpoints = [entry for entry in inside if is_checkpoint(entry)]
    best = best_of(checkpoints)
    found = ", ".join(entry.name for entry in inside[-_MANY:])
    values: dict[str, object] = {"directory": folder}
    values["prompts inside"] = found if len(inside) <= _MANY else f"{len(inside)}, the last of them {found}"
    if checkpoints:
        values["last"] = checkpoints[-1].name
    if best is not None:
        values["best"] = f"{best.name} ({_STATE} of {checkpoints[-1].name})"
    wanted = best or (checkpoints or inside)[-1]
    remedy = f"Load one of them: `softhooks.load(model, {str(wanted)!r})`."
    if best is not None and best != checkpoints[-1]:
        remedy = remedy[:-1] + f" (the best), `softhooks.load(model, {str(checkpoints[-1])!r})` (the last)."
    return CheckpointError("this directory holds no prompt itself, but directories that do.", remedy, **values)


def _whole_model(folder: Path, stray: list[str]) -> CheckpointError:
    return CheckpointError(
        "this directory holds the weights of a whole model and, among them, the live tensors of a prompt, as softhooks 0.1.0 "
        "and tools that save a plain state dict write it; `from_pretrained` would drop the prompt.",
        "Attach the prompt again with the method and the name that it was trained with, load these tensors with "
        "`model.load_state_dict(tensors, strict=False)`, where tensors = {name: tensor for name, tensor in "
        f'safetensors.torch.load_file(file).items() if "{CONTAINER}." in name}}, and save it with '
        "`prompt.save_pretrained(directory)`.",
        directory=folder,
        found=", ".join(stray[:3]) + (f" and {len(stray) - 3} more" if len(stray) > 3 else ""),
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is named like a checkpoint of a Trainer."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


def best_of(checkpoints: list[Path]) -> Path | None:
    """The best of a training's checkpoints by the Trainer's own record, if it knows one and that is still there."""
    if not checkpoints:
        return None
    told = _json(checkpoints[-1] / _STATE).get("best_model_checkpoint")
    name = re.split(r"[/\\]", told)[-1] if isinstance(told, str) else None
    return next((entry for entry in checkpoints if entry.name == name), None)


def stray_tensors(folder: Path) -> Iterator[str]:
    """The names of prompts' tensors among the weights of a whole model; of a file that cannot be read, none."""
    for file in sorted(entry for entry in _entries(folder) if entry.suffix == ".safetensors"):
        try:
            with safe_open(str(file), framework="pt") as weights:
                yield from filter(_is_of_prompt, weights.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError):
            continue
    for name in _INDEX_FILES:
        weight_map = _json(folder / name).get("weight_map")
        yield from filter(_is_of_prompt, weight_map if isinstance(weight_map, dict) else {})


def _is_of_prompt(name: str) -> bool:
    return CONTAINER in name.split(".")[:-1]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _order(entry: Path) -> tuple[bool, int, str]:
    """Checkpoints by their step, after all other directories."""
    match = _CHECKPOINT.fullmatch(entry.name)
    return match is not None, int(match[1]) if match else 0, entry.name


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; empty if it is none."""
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= _SMALL else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
