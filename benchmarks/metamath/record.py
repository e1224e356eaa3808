"""Result files, in the format of PEFT's method comparison, so that its scripts read both."""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi

import softhooks
from benchmarks.metamath.data import GSM8K, METAMATH
from benchmarks.metamath.experiment import Experiment
from benchmarks.metamath.settings import Settings
from benchmarks.metamath.training import Log

Status = Literal["success", "canceled", "failed"]
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "softhooks")


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        created_at: when the run started, as an ISO date.
        status, error: how the run ended.
        log: the measurements of training.
        config: the method and its options; None if the model was not loaded.
        trainable, total: the number of trained parameters, and of all.
        file_size: the size of the saved weights.
        train_time, total_time: seconds of training and test, and of the whole run.
        peak: the peak memory.
        accelerator: the name of the GPU.
    """

    created_at: str
    status: Status = "success"
    error: str = ""
    log: Log = field(default_factory=Log)
    config: dict[str, Any] | None = None
    trainable: int = 0
    total: int = 0
    file_size: int = 0
    train_time: float = 0.0
    total_time: float = 0.0
    peak: int = 0
    accelerator: str = ""


def as_json(outcome: Outcome, experiment: Experiment, settings: Settings, *, hub_data: bool) -> dict[str, Any]:
    """Return the content of a result file."""
    reserved = outcome.log.reserved or [0]
    branch, dirty = _branch()
    api = HfApi()
    return {
        "run_info": {
            "created_at": outcome.created_at,
            "total_time": outcome.total_time,
            "experiment_name": experiment.label,
            "peft_branch": branch,
            "peft_worktree_is_dirty": dirty,
            "train_config": asdict(settings),
            "peft_config": outcome.config and {**outcome.config, "base_model_name_or_path": settings.model_id},
            "error_msg": outcome.error,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(sum(reserved) / len(reserved)),
            "accelerator_memory_max": outcome.peak,
            "accelerator_memory_reserved_99th": int(np.percentile(reserved, 99)),
            "train_time": outcome.train_time,
            "file_size": outcome.file_size,
            "num_trainable_params": outcome.trainable,
            "num_total_params": outcome.total,
            "status": outcome.status,
            "metrics": outcome.log.metrics,
        },
        "meta_info": {
            "model_info": _hub_info(None if Path(settings.model_id).is_dir() else settings.model_id, api.model_info),
            "dataset_info": {
                "metamath": _hub_info(METAMATH if hub_data else None, api.dataset_info),
                "gsm8k": _hub_info(GSM8K if hub_data else None, api.dataset_info),
            },
            "package_info": _packages(),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": outcome.accelerator,
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def write(result: dict[str, Any], directory: Path, *, with_defaults: bool) -> Path:
    """Write a result file.

    Args:
        result: the content.
        directory: the file is written to `results` if the run succeeded with the settings of its experiment; to
            `temporary_results` if it succeeded with others; and to `cancelled_results` if it did not succeed. Only results of the
            first kind replace an earlier file.
    """
    info = result["run_info"]
    name = info["experiment_name"].replace("/", "--")
    stamped = f"{name}--{info['created_at'].replace(':', '-')}"
    if result["train_info"]["status"] != "success":
        path = directory / "cancelled_results" / f"{stamped}.json"
    elif with_defaults:
        path = directory / "results" / f"{name}.json"
    else:
        path = directory / "temporary_results" / f"{stamped}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _hub_info(name: str | None, get: Any) -> dict[str, str | None]:
    if name is not None:
        try:
            info = get(name)
        except Exception as error:  # noqa: BLE001 - the Hub may be unreachable after hours of training
            warnings.warn(
                f"the revision of {name} is not recorded, because the Hub does not answer: {error}", stacklevel=2
            )
        else:
            return {"sha": info.sha, "created_at": info.created_at.isoformat() if info.created_at else None}
    return {"sha": None, "created_at": None}


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[f"{name}-version"] = version(name)
        except PackageNotFoundError:
            found[f"{name}-version"] = None
        spec = find_spec(name)
        found[f"{name}-commit-hash"] = _git(spec.origin, "rev-parse", "HEAD") if spec and spec.origin else None
    return found


def _branch() -> tuple[str, bool]:
    """Return the branch of softhooks' repository, and whether it has changes that are not committed."""
    branch = _git(softhooks.__file__, "rev-parse", "--abbrev-ref", "HEAD")
    changes = _git(softhooks.__file__, "status", "--porcelain", "--untracked-files=no")
    return branch or "no repository", bool(changes)


def _git(file: str, *arguments: str) -> str | None:
    """Ask git about the repository of a module; None if the module is installed, or there is no repository."""
    folder = Path(file).parent
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
